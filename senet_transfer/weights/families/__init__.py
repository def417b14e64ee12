"""Weight families: tensor names, layer options and preprocessing of each project's weights."""

from senet_transfer.weights.families.registry import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
