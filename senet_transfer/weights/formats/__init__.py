"""Weight file formats and their safe conversion to named tensors."""
