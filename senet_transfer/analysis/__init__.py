"""Analysis of models and training runs: complexity, excitations, ablations and reports."""
