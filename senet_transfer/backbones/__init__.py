"""The trunks. Importing this package registers all of them, by name and with Detectron2."""

from senet_transfer.backbones import (  # noqa: F401
    bn_inception,
    build,
    cifar_resnet,
    inception_resnet,
    mobilenet,
    resnet,
    shake,
    shufflenet,
    vgg,
    wide_resnet,
)
from senet_transfer.backbones.registry import create_backbone, list_models

__all__ = ["create_backbone", "list_models"]
