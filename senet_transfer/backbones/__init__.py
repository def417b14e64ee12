"""The trunks. Importing this package registers all of them, by name and with Detectron2."""

from senet_transfer.backbones import build, resnet  # noqa: F401
from senet_transfer.backbones.registry import create_backbone, list_models

__all__ = ["create_backbone", "list_models"]
