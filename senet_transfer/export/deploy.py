"""Networks for inference alone: norms folded into the convolutions before them."""

import copy

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from senet_transfer.models.backbones.blocks import SEBlock

FOLDABLE = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.SyncBatchNorm)


def deploy(model: nn.Module) -> nn.Module:
    """A copy of a network that can infer and nothing else, and does so faster.

    Batch norms, frozen or trained, become part of the convolutions that they belong to. A norm
    that comes before its convolution, as in pre-activation networks, stays as it is. A gate after
    a 1x1 convolution is computed from that convolution's input, which has fewer channels.

    Args:
        model: a backbone, a classifier or a detector. It is left as it is.

    Returns:
        A network in evaluation mode that computes the same to rounding. Its parameters don't
        learn, and have other names than those of the model.
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
