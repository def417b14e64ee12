"""Training, evaluation and what the command lines need."""
