"""Analysis of models and training runs: complexity, SE gates, ablation studies and reports."""
