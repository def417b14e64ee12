"""Training, evaluation, inference and process launching."""
