"""The backbones, a file for each family of architectures; importing it registers all by name."""

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
