"""Stems and residual blocks with and without SE, derived from Detectron2's classes.

Blocks with SE have the same parameter names as Detectron2's blocks. The names of the gate's
parameters start with ``se.``.
"""

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.fused.functions import (
    Fusable,
    conv_norm,
    conv_norm_relu,
    residual_end,
    uses_kernels,
)
from senet_transfer.layers.fused_gate import fold_squeeze, gated_sum
from senet_transfer.layers.squeeze_excitation import SEOptions

STEM_POOLS = ("pad", "ceil")


class PlainBasicBlock(Fusable, BasicBlock):
    """Detectron2's ``BasicBlock`` with fused kernels on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        if not uses_kernels(self.fused, x):
            return super().forward(x)
        out = conv_norm_relu(self.conv1, x, self.fused)
        return _plain_end(self, x, out, self.conv2)


class PlainBottleneckBlock(Fusable, BottleneckBlock):
    """Detectron2's ``BottleneckBlock`` with fused kernels on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        if not uses_kernels(self.fused, x):
            return super().forward(x)
        out = conv_norm_relu(self.conv1, x, self.fused)
        out = conv_norm_relu(self.conv2, out, self.fused)
        return _plain_end(self, x, out, self.conv3)


def _plain_end(
    block: PlainBasicBlock | PlainBottleneckBlock, x: Tensor, inner: Tensor, last: Conv2d
) -> Tensor:
    """Apply the last convolution of a residual block, the residual addition and the ReLU.

    Args:
        block: The block.
        x: The block's input.
        inner: The last convolution's input.
        last: The last convolution.
    """
    shortcut = x if block.shortcut is None else conv_norm(block.shortcut, x, block.fused)
    out = residual_end(last, None, inner, shortcut, block.fused)
    return F.relu_(last(inner) + shortcut) if out is None else out


class SEBlock(Fusable, CNNBlockBase):
    """Mixin that adds an SE gate to a residual block and computes the sum with the shortcut."""

    def __init__(self, *channels: int, se: SEOptions = SEOptions(), **options: Any):
        super().__init__(*channels, **options)
        check_not_mixture(se)
        if se.placement == "3x3" and not hasattr(self, "conv3"):
            raise UserError(
                "The SE placement is '3x3' (after the 3x3 convolution of a bottleneck), but "
                "ResNet-18 and ResNet-34 have basic blocks. Use a different placement, or depth 50 "
                "or more."
            )
        self.placement = se.placement
        self.relu_before = se.relu_before
        if se.placement == "pre":
            gated = self.in_channels
        else:
            gated = self.conv2.out_channels if se.placement == "3x3" else self.out_channels
        self.se = se.operator(gated)

    def fold_squeeze(self) -> None:
        """Fold the last convolution into the SE gate, for inference with folded batch norms.

        See :func:`senet_transfer.layers.fused_gate.fold_squeeze` for details.
        """
        if self.placement == "standard" and hasattr(self, "conv3") and not self.relu_before:
            fold_squeeze(self.conv3, self.se)

    def _end(self, x: Tensor, inner: Tensor, last: Conv2d) -> Tensor:
        """Apply the last convolution, the residual addition and the ReLU of a residual block.

        The SE gate is also applied by this method, unless its placement is "pre" or "3x3".

        Args:
            x: The block's input.
            inner: The last convolution's input.
            last: The last convolution.
        """
        shortcut = x if self.shortcut is None else conv_norm(self.shortcut, x, self.fused)
        out = None
        if self.placement != "identity" and not self.relu_before:
            se = self.se if self.placement == "standard" else None
            out = residual_end(last, se, inner, shortcut, self.fused)
        if out is None:
            out = F.relu_(self._sum(shortcut, inner, last))
        return self.se(out) if self.placement == "post" else out

    def _sum(self, shortcut: Tensor, inner: Tensor, last: Conv2d) -> Tensor:
        """Apply the last convolution, and return the sum of the branch and the shortcut.

        Args:
            shortcut: The output of the shortcut.
            inner: The input of the last convolution.
            last: The last convolution of the residual branch.
        """
        if self.placement == "identity":
            return self.se.gate_and_add(shortcut, last(inner))
        if self.placement != "standard":
            return last(inner) + shortcut
        if self.relu_before:
            return self.se.gate_and_add(F.relu_(last(inner)), shortcut)
        return gated_sum(last, self.se, inner, shortcut)


class SEBasicBlock(SEBlock, BasicBlock):
    """Residual block with two 3x3 convolutions and SE, for ResNet-18 and ResNet-34.

    The arguments are ``se`` and those of Detectron2's ``BasicBlock``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = self.se(x) if self.placement == "pre" else x
        out = conv_norm_relu(self.conv1, out, self.fused)
        return self._end(x, out, self.conv2)


class SEBottleneckBlock(SEBlock, BottleneckBlock):
    """Bottleneck block with SE, for ResNeXts and for ResNets with 50 or more layers.

    The arguments are ``se`` and those of Detectron2's ``BottleneckBlock``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = self.se(x) if self.placement == "pre" else x
        out = conv_norm_relu(self.conv1, out, self.fused)
        out = conv_norm_relu(self.conv2, out, self.fused)
        if self.placement == "3x3":
            out = self.se(out)
        return self._end(x, out, self.conv3)


class _WideBottleneck(CNNBlockBase):
    """Base class with the convolutions of :class:`SENet154Block`."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN"):
        super().__init__(in_channels, out_channels, stride)

        def conv(
            inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
        ) -> Conv2d:
            return _conv(inputs, outputs, kernel, stride=stride, groups=groups, norm=norm)

        width = out_channels // 2
        kernel = 1 if stride == 1 else 3
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, kernel, stride)
        self.conv1 = conv(in_channels, width, 1)
        self.conv2 = conv(width, out_channels, 3, stride, groups=64)
        self.conv3 = conv(out_channels, out_channels, 1)


class SENet154Block(SEBlock, _WideBottleneck):
    """Bottleneck block of SENet-154, as in the paper's appendix and the authors' definition.

    The 3x3 convolution has 64 groups, the block's stride, and as many channels as the output. The
    first 1x1 convolution has half as many channels. A shortcut that changes resolution is a 3x3
    convolution.
    """

    forward = SEBottleneckBlock.forward


def check_not_mixture(se: SEOptions) -> None:
    """Raise a UserError if the SE placement is "mixture", as only shake-shake networks allow it."""
    if se.placement == "mixture":
        raise UserError(
            "The SE placement is 'mixture' (after the mixture of two branches), but this network "
            "has one branch per block. Use a different placement, such as 'standard'."
        )


def _conv(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, norm: str
) -> nn.Module:
    conv = Conv2d(
        inputs,
        outputs,
        kernel_size=kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=False,
        norm=get_norm(norm, outputs),
    )
    weight_init.c2_msra_fill(conv)
    return conv


def _stem_pool(x: Tensor, pool: str) -> Tensor:
    if pool == "ceil":
        return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class ResNetStem(Fusable, BasicStem):
    """Detectron2's stem (7x7 convolution and max pool) with configurable padding of the max pool.

    The padding must be the same as in training. Otherwise, the weights can be loaded without an
    error, but the accuracy is lower. If the input's height and width are multiples of 4, the size
    of the feature maps doesn't depend on the padding.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 64, *, norm: str = "BN", pool: str = "pad"
    ):
        """
        Args:
            in_channels: Number of image channels.
            out_channels: Number of output channels; the output has stride 4.
            norm: Detectron2 norm name, such as "BN".
            pool: Border handling of the max pool: "pad" for a padding of 1 on every side
                (torchvision, Detectron2), or "ceil" for no padding and a last window that is
                clipped at the edge (the authors' Caffe files and files converted from them).
        """
        super().__init__(in_channels, out_channels, norm=norm)
        check_choice("The stem pool", pool, STEM_POOLS)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 4, W / 4)``."""
        return _stem_pool(conv_norm_relu(self.conv1, x, self.fused), self.pool)


class UnpooledStem(Fusable, BasicStem):
    """Stem of CSAIL's wideresnet18: a 7x7 convolution with stride 2, without a max pool."""

    pool = "none"

    def __init__(self, in_channels: int = 3, out_channels: int = 64, *, norm: str = "BN"):
        super().__init__(in_channels, out_channels, norm=norm)
        self.stride = 2

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 2, W / 2)``."""
        return conv_norm_relu(self.conv1, x, self.fused)


class SENet154Stem(Fusable, CNNBlockBase):
    """Stem of SENet-154, with three 3x3 convolutions (64, 64 and 128 channels) and a max pool.

    The arguments are those of :class:`ResNetStem`.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 128, *, norm: str = "BN", pool: str = "pad"
    ):
        super().__init__(in_channels, out_channels, 4)
        check_choice("The stem pool", pool, STEM_POOLS)
        self.pool = pool
        width = out_channels // 2
        self.conv1 = _conv(in_channels, width, 3, stride=2, norm=norm)
        self.conv2 = _conv(width, width, 3, norm=norm)
        self.conv3 = _conv(width, out_channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 4, W / 4)``."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = conv_norm_relu(conv, x, self.fused)
        return _stem_pool(x, self.pool)
