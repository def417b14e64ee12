"""Fused Triton kernels for norm, SE gate, sum and ReLU of residual blocks on a GPU."""
