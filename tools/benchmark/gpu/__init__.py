"""Benchmark ``gpu``: time and memory of training and inference on a GPU, with target values."""
