"""Rendered images for the demo."""
