"""The trunks. Importing this package registers all of them, by name and with Detectron2."""

from senet_transfer.backbones import (  # noqa: F401
    build,
    cifar_resnet,
    resnet,
    shake,
    wide_resnet,
)
from senet_transfer.backbones.registry import create_backbone, list_models

__all__ = ["create_backbone", "list_models"]
