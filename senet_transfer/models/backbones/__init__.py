"""The trunks. Importing this package registers all of them, by name and with Detectron2."""

from senet_transfer.models import build  # noqa: F401
from senet_transfer.models.backbones import (  # noqa: F401
    bn_inception,
    cifar_resnet,
    inception_resnet,
    mobilenet,
    resnet,
    shake_resnet,
    shufflenet,
    vgg,
    wide_resnet,
)
from senet_transfer.models.registry import create_backbone, list_models

__all__ = ["create_backbone", "list_models"]
