"""Residual blocks with SE, and stems, as Detectron2 building blocks.

The convolutions and their norms are Detectron2's own, so a block here has its plain counterpart's
parameters under the same names, and those of the gates under ``se``.
"""

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.fused_gate import fold_squeeze, gated_sum
from senet_transfer.layers.squeeze_excitation import SEOptions

STEM_POOLS = ("pad", "ceil")


class SEBlock(CNNBlockBase):
    """What a residual block becomes one with SE by: the gate and the sum with the shortcut."""

    def __init__(self, *channels: int, se: SEOptions = SEOptions(), **options: Any):
        super().__init__(*channels, **options)
        check_not_mixture(se)
        if se.placement == "3x3" and not hasattr(self, "conv3"):
            raise UserError(
                "The SE placement '3x3' means after the 3x3 convolution of a bottleneck, and "
                "basic blocks (ResNet-18 and -34) are none. Take another placement or depth 50 up."
            )
        self.placement = se.placement
        self.relu_before = se.relu_before
        if se.placement == "pre":
            gated = self.in_channels
        else:
            gated = self.conv2.out_channels if se.placement == "3x3" else self.out_channels
        self.se = se.operator(gated)

    def fold_squeeze(self) -> None:
        """For inference, once norms are folded: see :func:`~.fused_gate.fold_squeeze`."""
        if self.placement == "standard" and hasattr(self, "conv3") and not self.relu_before:
            fold_squeeze(self.conv3, self.se)

    def _join(self, x: Tensor, inner: Tensor, last: nn.Module) -> Tensor:
        """From the block's input, and that of its last convolution, to its output."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.placement == "identity":
            out = self.se.join(shortcut, last(inner))
        elif self.placement != "standard":
            out = last(inner) + shortcut
        elif self.relu_before:
            out = self.se.join(F.relu_(last(inner)), shortcut)
        else:
            out = gated_sum(last, self.se, inner, shortcut)
        out = F.relu_(out)
        return self.se(out) if self.placement == "post" else out


class SEBasicBlock(SEBlock, BasicBlock):
    """The residual block of two 3x3 convolutions (ResNet-18 and -34), with SE.

    Takes the arguments of Detectron2's ``BasicBlock`` and ``se``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = self.se(x) if self.placement == "pre" else x
        out = F.relu_(self.conv1(out))
        return self._join(x, out, self.conv2)


class SEBottleneckBlock(SEBlock, BottleneckBlock):
    """The bottleneck of ResNet-50 up and of ResNeXt, with SE.

    Takes the arguments of Detectron2's ``BottleneckBlock`` and ``se``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = self.se(x) if self.placement == "pre" else x
        out = F.relu_(self.conv1(out))
        out = F.relu_(self.conv2(out))
        if self.placement == "3x3":
            out = self.se(out)
        return self._join(x, out, self.conv3)


class _WideBottleneck(CNNBlockBase):
    """The convolutions of :class:`SENet154Block`."""

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
    """The bottleneck of SENet-154 (paper, appendix; the authors' network definition), with SE.

    The 3x3 convolution is as wide as the output and has 64 groups, the first 1x1 has half of
    that, the stride is in the 3x3, and a shortcut that changes resolution is a 3x3 convolution.
    """

    forward = SEBottleneckBlock.forward


def check_not_mixture(se: SEOptions) -> None:
    """Raises UserError for the placement that only shake networks have."""
    if se.placement == "mixture":
        raise UserError(
            "The SE placement 'mixture' means after a shake block has mixed its two branches, and "
            "this network has one branch a block. Take another placement, such as 'standard'."
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


class ResNetStem(BasicStem):
    """Detectron2's stem (7x7 convolution, max pool) with a choice of how the pool ends.

    Both choices give maps of the same size where the input's sides are multiples of 4, so nothing
    but the accuracy tells that a file of the other kind was loaded.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 64, *, norm: str = "BN", pool: str = "pad"
    ):
        """
        Args:
            in_channels: channels of the image.
            out_channels: channels of the output, of stride 4.
            norm: Detectron2's name of the norm after the convolution.
            pool: "pad", padding of 1 on every side (torchvision, Detectron2); "ceil", no padding
                and the last window cut off by the edge (the authors' Caffe files and their ports).
        """
        super().__init__(in_channels, out_channels, norm=norm)
        check_choice("The stem pool", pool, STEM_POOLS)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H / 4, W / 4)``."""
        return _stem_pool(F.relu_(self.conv1(x)), self.pool)


class SENet154Stem(CNNBlockBase):
    """SENet-154's stem: three 3x3 convolutions of 64, 64 and 128 channels, and the max pool.

    Takes the arguments of :class:`ResNetStem`.
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
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H / 4, W / 4)``."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return _stem_pool(x, self.pool)
