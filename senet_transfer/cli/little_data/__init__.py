"""Commands for small datasets."""
