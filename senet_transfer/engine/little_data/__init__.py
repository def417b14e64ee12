"""Methods for small datasets: frozen features, linear probes, k-NN and stage-wise fine-tuning."""
