"""CUDA graphs of training steps, which replay many kernels with one launch."""
