"""Commands for small datasets: feature extraction and linear probes with a frozen backbone."""
