"""Checkpoints of training runs: writing, finding, verifying and resuming."""
