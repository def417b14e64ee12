"""Utilities for all other parts of the package; they import only its errors."""
