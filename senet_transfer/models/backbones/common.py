"""Building blocks shared by several backbone families."""

import math

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.fused.functions import Fusable, gate_and_add
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation

# Number of groups in Detectron2's "GN".
_NORM_GROUPS = 32

_EPS = 1e-5


def make_norm(norm: str, channels: int, eps: float = _EPS) -> nn.Module:
    """Build a norm layer, given its Detectron2 name.

    Raises:
        UserError: If the norm is GN and the number of channels is not a multiple of the number of
            groups.
    """
    if norm == "GN" and channels % _NORM_GROUPS:
        raise UserError(
            f"The norm is GN, which requires a multiple of {_NORM_GROUPS} channels, but the "
            f"network has layers with {channels} channels. Use BN, SyncBN or FrozenBN."
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
    """Build a convolution, optionally followed by a norm and a ReLU.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        kernel: Kernel size, an integer or (height, width).
        stride: Stride of the convolution.
        groups: Number of groups.
        norm: Detectron2 norm name, such as "BN"; None for no norm.
        relu: Whether to add a ReLU.
        pad: Whether to pad the input by half the kernel size.
        bias: Whether the convolution has a bias.
        eps: Epsilon of the norm.
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
        # c2_msra_fill computes the fan-out over all output channels, but in a depthwise convolution
        # each input channel is connected to a single output channel.
        nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return conv


class Chain(CNNBlockBase):
    """Sequence of blocks that acts as one block, such as a stem."""

    def __init__(self, *blocks: CNNBlockBase):
        stride = math.prod(block.stride for block in blocks)
        super().__init__(blocks[0].in_channels, blocks[-1].out_channels, stride)
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        for block in self.children():
            x = block(x)
        return x


class MaxPool(CNNBlockBase):
    """Max pooling with stride 2 that can be used as a block in a stage."""

    def __init__(self, channels: int, *, kernel: int = 3, padding: int = 0, ceil: bool = False):
        """
        Args:
            channels: Number of channels of the feature map.
            kernel: Window size in pixels.
            padding: Padding on each side in pixels.
            ceil: Whether to add a last window that is clipped at the edge (``ceil_mode``).
        """
        super().__init__(channels, channels, 2)
        self.kernel, self.padding, self.ceil = kernel, padding, ceil

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, channels, H / 2, W / 2)``."""
        return F.max_pool2d(x, self.kernel, stride=2, padding=self.padding, ceil_mode=self.ceil)


class GatedBlock(Fusable, CNNBlockBase):
    """Base class of residual blocks with an optional SE gate.

    Attributes:
        placement: SE placement; None for a block without SE.
        se: SE gate; None if the block has no SE, or if its gates are inside the branches.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, stride)
        self.placement: str | None = None
        self.se: SqueezeExcitation | None = None

    def _enter(self, x: Tensor) -> Tensor:
        """Return the input of the branch, which is gated if the SE placement is "pre"."""
        return self.se(x) if self.se is not None and self.placement == "pre" else x

    def _sum(self, residual: Tensor, shortcut: Tensor, scale: float = 1.0) -> Tensor:
        """Compute ``scale * residual + shortcut``, with an SE gate if the placement requires it.

        With the placement "standard" or "mixture", the gate multiplies the residual, and is
        computed from the unscaled residual. With "identity", the gate multiplies the shortcut.
        """
        if self.se is not None and self.placement in ("standard", "mixture"):
            return gate_and_add(self.se, residual, shortcut, self.fused, scale)
        if self.se is not None and self.placement == "identity":
            residual = scale * residual if scale != 1 else residual
            return gate_and_add(self.se, shortcut, residual, self.fused)
        return torch.add(shortcut, residual, alpha=scale)

    def _leave(self, x: Tensor) -> Tensor:
        """Return the block's output, which is gated if the SE placement is "post"."""
        return self.se(x) if self.se is not None and self.placement == "post" else x
