"""What backbones of several families are made of."""

import math

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation

# Of Detectron2's "GN".
_NORM_GROUPS = 32

_EPS = 1e-5


def make_norm(norm: str, channels: int, eps: float = _EPS) -> nn.Module:
    """Detectron2's norm of a name.

    Raises:
        UserError: group norm can't divide so few channels.
    """
    if norm == "GN" and channels % _NORM_GROUPS:
        raise UserError(
            f"The norm is GN, which has {_NORM_GROUPS} groups, and the network has layers of "
            f"{channels} channels. Take BN, SyncBN or FrozenBN."
        )
    layer = get_norm(norm, channels)
    layer.eps = eps
    return layer


def make_conv(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    *,
    stride: int = 1,
    groups: int = 1,
    norm: str | None = None,
    relu: bool = False,
    pad: bool = True,
    bias: bool = False,
    eps: float = _EPS,
) -> Conv2d:
    """A convolution with the norm and the ReLU after it, if any.

    Args:
        inputs: channels.
        outputs: likewise.
        kernel: its size, or height and width.
        stride: in pixels.
        groups: of the channels.
        norm: Detectron2's name of a norm; None for none.
        relu: whether a ReLU ends it.
        pad: whether the map keeps its size up to the stride; otherwise it loses its border.
        bias: whether it has one.
        eps: of the norm.
    """
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    conv = Conv2d(
        inputs,
        outputs,
        kernel_size=kernel,
        stride=stride,
        padding=(height // 2, width // 2) if pad else 0,
        groups=groups,
        bias=bias,
        norm=None if norm is None else make_norm(norm, outputs, eps),
        activation=F.relu_ if relu else None,
    )
    weight_init.c2_msra_fill(conv)
    if 1 < groups == inputs:
        # The initialisation counts all outputs, of which an input of a depthwise one reaches one.
        nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return conv


class Chain(CNNBlockBase):
    """Blocks in a row as one block, such as a stem."""

    def __init__(self, *blocks: CNNBlockBase):
        stride = math.prod(block.stride for block in blocks)
        super().__init__(blocks[0].in_channels, blocks[-1].out_channels, stride)
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        for block in self.children():
            x = block(x)
        return x


class MaxPool(CNNBlockBase):
    """A max pool of stride 2 where it stands between blocks, and so is one."""

    def __init__(self, channels: int, *, kernel: int = 3, padding: int = 0, ceil: bool = False):
        """
        Args:
            channels: of the map.
            kernel: size of the window, in pixels.
            padding: of every side, in pixels.
            ceil: whether the edge may cut the last window off.
        """
        super().__init__(channels, channels, 2)
        self.kernel, self.padding, self.ceil = kernel, padding, ceil

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to ``(N, channels, H / 2, W / 2)``."""
        return F.max_pool2d(x, self.kernel, stride=2, padding=self.padding, ceil_mode=self.ceil)


class GatedBlock(CNNBlockBase):
    """A residual block whose sum with the shortcut may be gated.

    Attributes:
        placement: of its SE; None without.
        se: the gate, where it is not inside a branch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, stride)
        self.placement: str | None = None
        self.se: SqueezeExcitation | None = None

    def _enter(self, x: Tensor) -> Tensor:
        """What a branch gets of the block's input."""
        return self.se(x) if self.se is not None and self.placement == "pre" else x

    def _sum(self, residual: Tensor, shortcut: Tensor, scale: float = 1.0) -> Tensor:
        """``scale * residual + shortcut``, gated; the gate sees what is not scaled yet."""
        if self.se is not None and self.placement in ("standard", "mixture"):
            return self.se.join(residual, shortcut, scale)
        if self.se is not None and self.placement == "identity":
            return self.se.join(shortcut, scale * residual if scale != 1 else residual)
        return torch.add(shortcut, residual, alpha=scale)

    def _leave(self, x: Tensor) -> Tensor:
        """What leaves the block of the sum."""
        return self.se(x) if self.se is not None and self.placement == "post" else x
