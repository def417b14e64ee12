"""Fused Triton kernels that compute norm, SE gate, sum and ReLU of residual blocks on a GPU."""
