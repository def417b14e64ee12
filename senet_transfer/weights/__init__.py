"""Weight files of every family that people have, loaded right or refused.

Knows no network by class: it looks at tensors and at modules, so that the backbones can use it.
"""

from senet_transfer.weights.families.registry import FAMILIES
from senet_transfer.weights.file_geometry import apply_file_geometry
from senet_transfer.weights.hub.catalogue import list_catalogue, resolve
from senet_transfer.weights.load import LoadReport, load_weights
from senet_transfer.weights.save import save_weights

__all__ = [
    "FAMILIES",
    "LoadReport",
    "apply_file_geometry",
    "list_catalogue",
    "load_weights",
    "resolve",
    "save_weights",
]
