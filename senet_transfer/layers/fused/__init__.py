"""Fused Triton kernels for the norm, SE gate, residual addition and ReLU of residual blocks."""
