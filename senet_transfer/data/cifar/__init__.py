"""Datasets of small images that are kept in memory, such as CIFAR."""
