"""Methods for small data sets: frozen features, linear probes, k-NN and stage-wise fine-tuning."""
