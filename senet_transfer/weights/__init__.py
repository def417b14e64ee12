"""Loading, checking and saving of weight files from this project and other projects.

This package operates on tensors and modules. It does not import any network classes, so the
backbones can import it without a circular import.
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
