"""Analysis of models and training runs: cost, excitations, ablations and reports."""
