"""Utilities used throughout the package, which depend only on :mod:`senet_transfer.errors`."""
