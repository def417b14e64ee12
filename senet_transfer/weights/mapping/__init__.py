"""Mapping of a file's tensors to a model's tensors."""
