"""Benchmark ``gpu``: training and inference on a GPU, compared with target values."""
