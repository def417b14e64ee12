"""Utilities used throughout the package, which depend only on its errors."""
