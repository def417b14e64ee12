"""The families of pretrained weights: how each is detected, renamed and computed."""

from senet_transfer.weights.families.registry import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
