"""Building blocks of CIFAR networks (32x32 images): the stem and pre-activation blocks.

Papers: He et al., "Identity Mappings in Deep Residual Networks" (2016), for pre-activation ResNets;
Zagoruyko and Komodakis, "Wide Residual Networks" (2016).

In a pre-activation block, norms and ReLUs precede the convolutions. The SE placement determines
what is gated:

- "standard": the output of the last convolution.
- "identity": the shortcut.
- "post": the sum, which is not followed by a ReLU.
- "3x3": the input of the last 1x1 convolution of a bottleneck.
- "pre": the input of the residual branch. This is the block's input, or the output of the first
  norm and ReLU if the shortcut starts after them.
"""

from itertools import pairwise

import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.fused.functions import Fusable, gate_add_norm, norm_relu
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.blocks import check_not_mixture
from senet_transfer.models.backbones.builder import StemAndStages, stage_se
from senet_transfer.models.backbones.common import GatedBlock, make_conv, make_norm
from senet_transfer.utils.private_api import has_hooks

# A sum, and the output of the norm and ReLU that follow it.
SumAndOutput = tuple[Tensor, Tensor]


class CifarStem(CNNBlockBase):
    """Stem with a 3x3 convolution of stride 1, optionally followed by a norm and a ReLU."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 16,
        *,
        norm: str | None = None,
        relu: bool = False,
    ):
        """
        Args:
            in_channels: Number of image channels.
            out_channels: Number of output channels; the output has stride 1.
            norm: Detectron2 norm name, such as "BN"; None for no norm.
            relu: Whether the stem ends with a ReLU.
        """
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = make_conv(in_channels, out_channels, 3, norm=norm)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``."""
        x = self.conv1(x)
        return F.relu_(x) if self.relu else x


class NormReLU(Fusable, CNNBlockBase):
    """Final norm and ReLU of a pre-activation network, as a block of the last stage."""

    def __init__(self, channels: int, *, norm: str):
        super().__init__(channels, channels, 1)
        self.norm = make_norm(norm, channels)

    @property
    def first_norm(self) -> nn.Module:
        """The norm layer.

        With fused kernels, the preceding block applies it; see :meth:`PreActBlock.link`.
        """
        return self.norm

    def forward(self, x: Tensor | SumAndOutput) -> Tensor:
        """Apply norm and ReLU to ``(N, C, H, W)``.

        If the preceding block has already applied the norm and ReLU, ``x`` is a tuple of the
        input and the output of these two layers, and this method returns the output.
        """
        return x[1] if isinstance(x, tuple) else norm_relu(self.norm, x, self.fused)


class PaddedShortcut(nn.Module):
    """Parameter-free shortcut with subsampling and zero-padded channels (option A of He et al.)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.added = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.added))


class PreActBlock(GatedBlock):
    """Pre-activation residual block with two or three convolutions, with or without SE."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int | None = None,
        stride: int = 1,
        norm: str = "BN",
        se: SEOptions | None = None,
        projection: bool = True,
        shared: bool | None = None,
    ):
        """
        Args:
            in_channels: Number of input channels.
            out_channels: Number of output channels.
            bottleneck_channels: Number of channels of a bottleneck's 3x3 convolution. The stride of
                a bottleneck is in its first 1x1 convolution. None builds a block with two 3x3
                convolutions.
            stride: Stride of the block.
            norm: Detectron2 norm name, such as "BN".
            se: SE variant; None for a block without SE.
            projection: Whether a shortcut that changes the shape is a 1x1 convolution. Otherwise,
                it is a :class:`PaddedShortcut`.
            shared: Whether the shortcut starts after the first norm and ReLU. If None, this is the
                case only for a shortcut that changes the shape.

        Raises:
            UserError: If the block does not support the SE placement.
        """
        super().__init__(in_channels, out_channels, stride)
        # Stored in a tuple, so the next block does not become a submodule.
        self._following: tuple[PreActBlock | NormReLU, ...] = ()
        changes = in_channels != out_channels or stride != 1
        self.shared = changes if shared is None else shared
        self.shortcut = self._make_shortcut(stride, projection) if changes else None
        kernels: tuple[int, ...]
        if bottleneck_channels is None:
            inner, kernels = out_channels, (3, 3)
        else:
            inner, kernels = bottleneck_channels, (1, 3, 1)
        widths = [in_channels, *[inner] * (len(kernels) - 1), out_channels]
        self.depth = len(kernels)
        for index, kernel in enumerate(kernels):
            inputs, outputs = widths[index : index + 2]
            conv = make_conv(inputs, outputs, kernel, stride=stride if index == 0 else 1)
            self.add_module(f"norm{index + 1}", make_norm(norm, inputs))
            self.add_module(f"conv{index + 1}", conv)
        if se is not None:
            check_preact_se(se, bottleneck=self.depth == 3)
            channels = {"pre": in_channels, "3x3": inner}.get(se.placement, out_channels)
            self.placement, self.se = se.placement, se.operator(channels)

    def _make_shortcut(self, stride: int, projection: bool) -> nn.Module:
        if projection:
            return make_conv(self.in_channels, self.out_channels, 1, stride=stride)
        return PaddedShortcut(self.in_channels, self.out_channels, stride)

    @property
    def first_norm(self) -> nn.Module | None:
        """The norm layer applied to the block's input; None if a gate precedes this layer."""
        return None if self.placement == "pre" and not self.shared else self.norm1

    def link(self, following: "PreActBlock | NormReLU") -> None:
        """Let this block also apply the next block's first norm and ReLU if fused kernels are used.

        Args:
            following: The next block, which must be the only one that uses this block's output.
        """
        self._following = (following,)

    def forward(self, x: Tensor | SumAndOutput) -> Tensor | SumAndOutput:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``.

        With fused kernels and after :meth:`link`, the block also returns the output of the next
        block's first norm and ReLU.
        """
        x, out = x if isinstance(x, tuple) else (x, None)
        if self.shared:
            x = norm_relu(self.norm1, x, self.fused) if out is None else out
            out = self._enter(x)
        elif out is None:
            out = norm_relu(self.norm1, self._enter(x), self.fused)
        out = self.conv1(out)
        out = self.conv2(norm_relu(self.norm2, out, self.fused))
        if self.depth == 3:
            out = norm_relu(self.norm3, out, self.fused)
            if self.se is not None and self.placement == "3x3":
                out = self.se(out)
            out = self.conv3(out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self._linked_end(out, shortcut) or self._leave(self._sum(out, shortcut))

    def _linked_end(self, residual: Tensor, shortcut: Tensor) -> SumAndOutput | None:
        """Return the block's output ``s`` and the next block's ``relu(norm(s))``.

        If the two blocks can't be fused, return None.
        """
        if not self._following or self.placement == "post":
            return None
        (following,) = self._following
        norm = following.first_norm
        if norm is None or has_hooks(self) or has_hooks(following):
            return None
        gate = self.se if self.placement in ("standard", "identity") else None
        if self.placement == "identity":
            residual, shortcut = shortcut, residual
        return gate_add_norm(gate, norm, residual, shortcut, self.fused)


def check_preact_se(se: SEOptions, *, bottleneck: bool) -> None:
    """Raise a UserError if a pre-activation block does not support an SE variant."""
    check_not_mixture(se)
    check_cifar_se(se)
    if se.placement == "3x3" and not bottleneck:
        raise UserError(
            "The SE placement is '3x3' (after the 3x3 convolution of a bottleneck), but this "
            "network has basic blocks. Use a different placement, or a network with bottlenecks."
        )


def check_cifar_se(se: SEOptions) -> None:
    """Raise a UserError if CIFAR networks do not support an SE variant."""
    if se.relu_before:
        raise UserError(
            "se_relu_before is True, but CIFAR networks do not support a ReLU before the gate. Set "
            "se_relu_before to False."
        )
    if not set(se.stages) & {2, 3, 4}:
        raise UserError(
            f"The stages with SE are {tuple(se.stages)}, but the network has stages 2, 3 and 4. "
            "Choose from these, or use the network without SE."
        )


def preact_parts(
    *,
    widths: tuple[int, int, int],
    blocks: int,
    in_channels: int,
    se: SEOptions | None,
    norm: str,
    bottleneck: bool = False,
    projection: bool = True,
    shares: bool = False,
) -> StemAndStages:
    """Build the stem and the three stages of a pre-activation backbone.

    Args:
        widths: Number of output channels of each stage.
        blocks: Number of blocks per stage.
        in_channels: Number of image channels.
        se: SE variant; None builds the network without SE.
        norm: Detectron2 norm name, such as "BN".
        bottleneck: Whether the blocks are bottlenecks, whose 3x3 convolution has a quarter of the
            stage's channels.
        projection: See :class:`PreActBlock`.
        shares: Whether the shortcut in the first block of each stage always starts after the first
            norm and ReLU, even if the block's input and output have the same shape.

    Raises:
        UserError: If the network does not support the SE variant.
    """
    if se is not None:
        check_preact_se(se, bottleneck=bottleneck)
    stages = _preact_stages(
        widths, blocks, se, norm, bottleneck=bottleneck, projection=projection, shares=shares
    )
    stages[-1].append(NormReLU(widths[-1], norm=norm))
    for stage in stages:
        for block, following in pairwise(stage):
            block.link(following)
    return CifarStem(in_channels, 16), stages


def _preact_stages(
    widths: tuple[int, int, int],
    blocks: int,
    se: SEOptions | None,
    norm: str,
    *,
    bottleneck: bool,
    projection: bool,
    shares: bool,
) -> list[list[CNNBlockBase]]:
    return [
        ResNet.make_stage(
            PreActBlock,
            blocks,
            in_channels=inputs,
            out_channels=width,
            bottleneck_channels=width // 4 if bottleneck else None,
            stride_per_block=[1 if stage == 2 else 2] + [1] * (blocks - 1),
            shared_per_block=[True if shares else None] + [None] * (blocks - 1),
            norm=norm,
            se=stage_se(se, stage),
            projection=projection,
        )
        for stage, inputs, width in zip((2, 3, 4), (16, *widths[:2]), widths, strict=True)
    ]
