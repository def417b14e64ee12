"""Inference-only networks with batch norms folded into the preceding convolutions."""

import copy

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from senet_transfer.models.backbones.blocks import SEBlock

FOLDABLE = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.SyncBatchNorm)


def deploy(model: nn.Module) -> nn.Module:
    """Return a faster copy of a network for inference only.

    Batch norms, including frozen ones, are folded into the preceding convolutions. Norms that
    precede their convolution, as in pre-activation networks, are not folded. If an SE block follows
    a 1x1 convolution, its squeeze is computed from the convolution's input, which has fewer
    channels.

    Args:
        model: A backbone, a classifier or a detector. It is not modified.

    Returns:
        The network in evaluation mode, with the same outputs except for rounding. Its parameters
        do not require gradients, and their names differ from those of ``model``.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv2d) and isinstance(module.norm, FOLDABLE):
            _fold(module)
    for module in model.modules():
        if isinstance(module, SEBlock):
            module.fold_squeeze()
    return model


def _fold(conv: Conv2d) -> None:
    norm = conv.norm
    conv.weight, conv.bias = (
        nn.Parameter(tensor, requires_grad=False)
        for tensor in fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    )
    conv.norm = None
