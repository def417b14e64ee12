"""Families of pretrained weights: detection, tensor names, geometry and preprocessing of each."""

from senet_transfer.weights.families.registry import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
