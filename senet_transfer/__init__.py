"""Squeeze-and-Excitation networks beyond ImageNet, on Detectron2.

Importing this package registers its trunks, heads and data sets with Detectron2.
"""

import warnings

try:
    with warnings.catch_warnings():
        # Detectron2 scripts some functions when it is imported, which recent versions of torch
        # call deprecated; nothing here uses them.
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("detectron2"):
        raise
    raise ImportError(
        "senet_transfer needs Detectron2, which is not on the package index under its own name. "
        "In a clone of this project run `python tools/install_detectron2.py`, or build "
        "Detectron2 from its official source."
    ) from error

from senet_transfer.config import add_senet_config, get_senet_config
from senet_transfer.data.detection.coco import register_shapes
from senet_transfer.errors import UserError
from senet_transfer.export.deploy import deploy
from senet_transfer.models import create_classifier
from senet_transfer.models.backbones import create_backbone, list_models
from senet_transfer.weights import apply_file_geometry, list_catalogue, load_weights, save_weights

register_shapes()

__all__ = [
    "UserError",
    "add_senet_config",
    "apply_file_geometry",
    "create_backbone",
    "create_classifier",
    "deploy",
    "get_senet_config",
    "list_catalogue",
    "list_models",
    "load_weights",
    "save_weights",
]
