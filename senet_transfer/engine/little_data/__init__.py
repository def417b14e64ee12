"""Methods for small data sets: features, probes, and fine-tuning of the backbone by stages."""
