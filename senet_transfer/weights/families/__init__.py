"""Families of pretrained weights, each with its tensor names, layer options and preprocessing."""

from senet_transfer.weights.families.registry import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
