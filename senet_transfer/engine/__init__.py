"""Training, evaluation, prediction and process launching."""
