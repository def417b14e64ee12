"""Methods for small data sets: features, probes, and stage-wise fine-tuning of the backbone."""
