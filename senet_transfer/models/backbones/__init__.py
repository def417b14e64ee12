"""Backbones, with one module per architecture family.

Importing this package registers all backbones by name.
"""

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
