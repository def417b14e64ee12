"""Training checkpoints: saving, finding, verifying and resuming."""
