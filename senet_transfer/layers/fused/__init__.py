"""Fused Triton kernels that compute the norm, SE gate, sum and ReLU of residual blocks on a GPU."""
