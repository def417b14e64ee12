"""Utilities for the whole package. They depend only on :mod:`senet_transfer.errors`."""
