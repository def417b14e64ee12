"""Rendered datasets of geometric shapes for demos and smoke tests."""
