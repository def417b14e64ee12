"""Benchmark ``gpu``: training and inference on a GPU, compared with the targets."""
