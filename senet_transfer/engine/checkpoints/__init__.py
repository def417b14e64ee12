"""Checkpoints of a run: writing, finding and resuming from them."""
