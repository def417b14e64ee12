"""Rendered data sets of geometric shapes for demos and smoke tests."""
