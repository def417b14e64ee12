"""Shake-Shake 26 2x96d and Shake-Even 29 2x4x64d, for CIFAR.

Paper: Gastaldi, "Shake-Shake regularization" (2017).

Shake-Shake 26 follows the author's released code. Its blocks have two branches, each with ReLU, 3x3
convolution, norm, ReLU, 3x3 convolution and norm. If a block changes the shape, its shortcut
concatenates the outputs of two 1x1 convolutions. The second convolution reads the feature map
shifted by one pixel.

The author did not release Shake-Even 29. In this project, it is the ResNeXt-29 of Xie et al. 2017
with two branches instead of one. Its blocks are bottlenecks with a ReLU after the sum, and its
shortcuts are 1x1 convolutions.

The SENet paper does not specify the position of SE in these blocks. This module supports the
following values of ``se_placement``:

- "standard": a gate on each branch, before the branches are mixed.
- "mixture": a single gate on the mixture.
- "pre": a gate on the common input of the branches.
- "identity": a gate on the shortcut.
- "post": a gate on the sum, after the ReLU if there is one.
- "3x3": a gate on each branch's 3x3 convolution, only in Shake-Even 29.

A gate on C channels has ``2 C (C // r) + C + C // r`` parameters. The table lists the parameters of
the networks without SE, and the parameters that the gates add with r = 16. The number of classes is
in parentheses. In the first stage, the gates have 6 hidden units in Shake-Shake 26, and 16 in
Shake-Even 29.

===========================  ==========  ===========  ==========
network                      without SE  standard     mixture
===========================  ==========  ===========  ==========
shake_shake26_2x96d (10)     26,192,922  +199,248     +99,624
shake_even29_2x4x64d (100)   34,529,700  +1,043,616   +521,808
===========================  ==========  ===========  ==========
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.shake_shake import ShakeMix
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import (
    CIFAR_FEATURES,
    build_backbone,
    stage_se,
)
from senet_transfer.models.backbones.cifar_blocks import CifarStem, check_cifar_se
from senet_transfer.models.backbones.common import GatedBlock, make_conv, make_norm
from senet_transfer.models.registry import register_with_se
from senet_transfer.preprocessing import CIFAR10, CIFAR100


class ShiftedShortcut(nn.Module):
    """Shortcut with two concatenated 1x1 convolutions and a norm.

    The second convolution reads the feature map shifted by one pixel.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: str):
        super().__init__()
        self.conv1 = make_conv(in_channels, out_channels // 2, 1, stride=stride)
        self.conv2 = make_conv(in_channels, out_channels // 2, 1, stride=stride)
        self.norm = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        # Shift by one pixel, even if the stride is 1, as in the author's code.
        shifted = F.pad(x, (1, -1, 1, -1))
        return self.norm(torch.cat((self.conv1(x), self.conv2(shifted)), dim=1))


class BasicBranch(nn.Module):
    """Branch of a basic block: two 3x3 convolutions with norms, and a ReLU between them.

    The block applies another ReLU to the input of its branches.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, norm: str, se: SEOptions | None
    ):
        super().__init__()
        self.conv1 = make_conv(in_channels, out_channels, 3, stride=stride, norm=norm)
        self.conv2 = make_conv(out_channels, out_channels, 3, norm=norm)
        self.se = se.operator(out_channels) if se else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        x = self.conv2(F.relu_(self.conv1(x)))
        return x if self.se is None else self.se(x)


class BottleneckBranch(nn.Module):
    """Bottleneck branch of a ResNeXt block, in which all convolutions have the same width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        norm: str,
        se: SEOptions | None,
        num_groups: int = 4,
    ):
        super().__init__()
        inner = out_channels
        self.conv1 = make_conv(in_channels, inner, 1, norm=norm)
        self.conv2 = make_conv(inner, inner, 3, stride=stride, groups=num_groups, norm=norm)
        self.conv3 = make_conv(inner, out_channels, 1, norm=norm)
        self.placement = se.placement if se else None
        self.se = se.operator(out_channels) if se else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        x = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        if self.se is not None and self.placement == "3x3":
            x = self.se(x)
        x = self.conv3(x)
        return self.se(x) if self.se is not None and self.placement == "standard" else x


class _ShakeBlock(GatedBlock, ABC):
    """Base class of shake-shake blocks, with two branches, their mixture, a shortcut and SE."""

    branch: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        even: bool = False,
        norm: str = "BN",
        se: SEOptions | None = None,
    ):
        """
        Args:
            in_channels: Number of input channels.
            out_channels: Number of output channels.
            stride: Stride of the block.
            even: Whether to use Shake-Even; see :class:`~senet_transfer.layers.ShakeMix`.
            norm: Detectron2 norm name, such as "BN".
            se: SE variant; None for a block without SE.
        """
        super().__init__(in_channels, out_channels, stride)
        inside = se if se and se.placement in ("standard", "3x3") else None
        options = {"stride": stride, "norm": norm}
        self.branch1 = self.branch(in_channels, out_channels, **options, se=inside)
        self.branch2 = self.branch(in_channels, out_channels, **options, se=inside)
        self.mix = ShakeMix(even=even)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = self._make_shortcut(stride, norm)
        if se:
            self.placement = se.placement
        if se and inside is None:
            self.se = se.operator(in_channels if se.placement == "pre" else out_channels)

    @abstractmethod
    def _make_shortcut(self, stride: int, norm: str) -> nn.Module:
        """Build the shortcut of a block whose input and output shapes differ."""

    def freeze(self) -> CNNBlockBase:
        """Freeze the block as in Detectron2, and mix its branches equally, as in evaluation."""
        self.mix.random = False
        return super().freeze()

    def _mixture(self, x: Tensor) -> Tensor:
        return self.mix(self.branch1(x), self.branch2(x))


class ShakeBasicBlock(_ShakeBlock):
    """Residual block of Shake-Shake 26."""

    branch = BasicBranch

    def _make_shortcut(self, stride: int, norm: str) -> nn.Module:
        return ShiftedShortcut(self.in_channels, self.out_channels, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        residual = self._mixture(F.relu(self._enter(x)))
        shortcut = x if self.shortcut is None else self.shortcut(F.relu(x))
        return self._leave(self._sum(residual, shortcut))


class ShakeBottleneckBlock(_ShakeBlock):
    """Residual block of Shake-Even 29: a ResNeXt block with two branches."""

    branch = BottleneckBranch

    def _make_shortcut(self, stride: int, norm: str) -> nn.Module:
        return make_conv(self.in_channels, self.out_channels, 1, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        residual = self._mixture(self._enter(x))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self._leave(F.relu_(self._sum(residual, shortcut)))


class FinalReLU(CNNBlockBase):
    """Final ReLU of Shake-Shake 26, in a separate block because residual blocks end with a sum."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the ReLU to a feature map of any shape."""
        return F.relu(x)


def build_shake_shake26(
    *,
    width: int = 96,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build Shake-Shake-Image 26 2x(width)d with stages res2 to res4.

    The outputs of these stages have strides 1, 2 and 4 relative to the input image. Only res4 ends
    with a ReLU.

    Args:
        width: Number of channels in res2, an even number. Each later stage doubles it.
        se: SE variant; None builds the network without SE.
        norm: Detectron2 norm name, such as "BN".
        in_channels: Number of image channels.
        out_features: Names of the stages whose outputs are returned; None for the last stage.
        freeze_at: Number of stages to freeze, counted from the stem.

    Raises:
        UserError: If the width is invalid or the network does not support the SE variant.
    """
    if width < 2 or width % 2:
        raise UserError(
            f"The width of the Shake-Shake network is {width}; expected an even number >= 2."
        )
    if se is not None and se.placement == "3x3":
        raise UserError(
            "The SE placement is '3x3' (after the 3x3 convolution of a bottleneck), but "
            "Shake-Shake 26 has basic blocks. Use a different placement, or shake_even29_2x4x64d."
        )
    stem = CifarStem(in_channels, 16, norm=norm)
    stages = _stages(ShakeBasicBlock, 4, 16, width, se=se, norm=norm, even=False)
    stages[-1].append(FinalReLU(4 * width))
    return build_backbone(
        stem, stages, out_features=out_features, freeze_at=freeze_at, features=CIFAR_FEATURES
    )


def build_shake_even29(
    *,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build Shake-Even-Image 29 2x4x64d.

    The outputs of the stages res2 to res4 have strides 1, 2 and 4 relative to the input image.
    """
    stem = CifarStem(in_channels, 64, norm=norm, relu=True)
    stages = _stages(ShakeBottleneckBlock, 3, 64, 256, se=se, norm=norm, even=True)
    return build_backbone(
        stem, stages, out_features=out_features, freeze_at=freeze_at, features=CIFAR_FEATURES
    )


def _stages(
    block: type[_ShakeBlock],
    blocks: int,
    inputs: int,
    width: int,
    *,
    se: SEOptions | None,
    norm: str,
    even: bool,
) -> list[list[CNNBlockBase]]:
    if se is not None:
        check_cifar_se(se)
    return [
        ResNet.make_stage(
            block,
            blocks,
            in_channels=inputs if stage == 2 else width * 2 ** (stage - 3),
            out_channels=width * 2 ** (stage - 2),
            stride_per_block=[1 if stage == 2 else 2] + [1] * (blocks - 1),
            norm=norm,
            even=even,
            se=stage_se(se, stage),
        )
        for stage in (2, 3, 4)
    ]


register_with_se("shake_shake26_2x96d", build_shake_shake26, preprocessing=CIFAR10)
# The paper uses this network for CIFAR-100.
register_with_se("shake_even29_2x4x64d", build_shake_even29, preprocessing=CIFAR100)
