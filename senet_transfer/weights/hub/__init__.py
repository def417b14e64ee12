"""Published weights: their catalogue and their download."""
