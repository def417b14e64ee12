"""Inception-ResNet-v2, with and without SE.

Paper: Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
Learning" (2017). This module implements the version that the authors published in TensorFlow, which
timm and ``pretrainedmodels`` also provide. Its channel counts differ from the paper's figures.

With SE, each of the 40 residual blocks gates its residual branch, after the last 1x1 convolution
and before the residual is scaled. The modules that change the resolution have no shortcut and no
gate. The SENet paper does not specify the position of the gate. It only mentions "similar schemes"
(section 3.3). With r = 16 and 1000 classes, the gates add 8,543,980 parameters to the 55,843,464
parameters of the network without SE.

With ``padding="valid"``, as in the published network, many convolutions and pools are not padded.
With ``padding="same"``, they are padded, so the feature maps are aligned with the image, as
detectors and FPNs require. TensorFlow's detectors with this backbone also pad these layers, and use
the same weights.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from senet_transfer.errors import check_choice
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import build_backbone, check_se, stage_se
from senet_transfer.models.backbones.common import Chain, GatedBlock, MaxPool, make_conv
from senet_transfer.models.registry import register_with_se
from senet_transfer.preprocessing import Preprocessing

PADDINGS = ("valid", "same")

PLACEMENTS = ("standard", "pre", "post", "identity")

_EPS = 1e-3

# Residual blocks of res3, res4 and res5: kernel size and channels of the convolutions in each
# branch, number of blocks, and scale of the residual.
RESIDUAL = {
    3: (((1, 32),), ((1, 32), (3, 32)), ((1, 32), (3, 48), (3, 64))),
    4: (((1, 192),), ((1, 128), ((1, 7), 160), ((7, 1), 192))),
    5: (((1, 192),), ((1, 192), ((1, 3), 224), ((3, 1), 256))),
}
COUNTS = {3: 10, 4: 20, 5: 10}
SCALES = {3: 0.17, 4: 0.10, 5: 0.20}

# Convolutions in the modules that precede the residual blocks. The last branch of each module is a
# pool and is not listed.
MIXED = {
    3: (((1, 96),), ((1, 48), (5, 64)), ((1, 64), (3, 96), (3, 96))),
    4: (((3, 384),), ((1, 256), (3, 256), (3, 384))),
    5: (((1, 256), (3, 384)), ((1, 256), (3, 288)), ((1, 256), (3, 288), (3, 320))),
}

Branch = tuple[tuple[int | tuple[int, int], int], ...]


def _branch(inputs: int, layers: Branch, *, norm: str, reduces: bool, pad: bool) -> nn.Sequential:
    """Build a branch of convolutions. If ``reduces`` is True, the last convolution has stride 2."""
    convs = []
    for index, (kernel, width) in enumerate(layers):
        last = reduces and index == len(layers) - 1
        stride, keep = (2, pad) if last else (1, True)
        convs.append(_conv(inputs, width, kernel, norm=norm, stride=stride, pad=keep))
        inputs = width
    return nn.Sequential(*convs)


def _conv(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    *,
    norm: str,
    stride: int = 1,
    pad: bool = True,
) -> nn.Module:
    return make_conv(
        inputs, outputs, kernel, stride=stride, norm=norm, relu=True, pad=pad, eps=_EPS
    )


class ConvBlock(CNNBlockBase):
    """Convolution with norm and ReLU, as a block of a stage."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        norm: str,
        stride: int = 1,
        pad: bool = True,
    ):
        super().__init__(in_channels, out_channels, stride)
        self.conv = _conv(in_channels, out_channels, kernel, norm=norm, stride=stride, pad=pad)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        return self.conv(x)


class MixedBlock(CNNBlockBase):
    """Inception module without a shortcut: the first module of res3, or a module with stride 2."""

    def __init__(
        self,
        in_channels: int,
        branches: tuple[Branch, ...],
        *,
        projection: int,
        norm: str,
        pad: bool,
    ):
        """
        Args:
            in_channels: Number of input channels.
            branches: Convolutions of each branch.
            projection: Channels of the 1x1 convolution after an average pool; 0 builds a module
                with stride 2 and a max pool instead.
            norm: Detectron2 norm name, such as "BN".
            pad: Whether layers with stride 2 are padded.
        """
        outputs = sum(layers[-1][1] for layers in branches) + (projection or in_channels)
        super().__init__(in_channels, outputs, 1 if projection else 2)
        self.pad = pad
        self.branches = nn.ModuleList(
            _branch(in_channels, layers, norm=norm, reduces=not projection, pad=pad)
            for layers in branches
        )
        self.project = _conv(in_channels, projection, 1, norm=norm) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        if self.project is None:
            last = F.max_pool2d(x, 3, stride=2, padding=int(self.pad))
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            last = self.project(pooled)
        return torch.cat([*(branch(x) for branch in self.branches), last], dim=1)


class InceptionResidualBlock(GatedBlock):
    """Residual block whose branch is an Inception module, optionally with SE."""

    def __init__(
        self,
        channels: int,
        branches: tuple[Branch, ...],
        *,
        scale: float,
        relu: bool = True,
        norm: str = "BN",
        se: SEOptions | None = None,
    ):
        """
        Args:
            channels: Number of input and output channels.
            branches: Convolutions of each branch; the branches are concatenated and projected back
                to ``channels``.
            scale: Scale of the residual in the sum.
            relu: Whether a ReLU follows the sum.
            norm: Detectron2 norm name, such as "BN".
            se: SE variant; None for a block without SE.
        """
        super().__init__(channels, channels, 1)
        self.branches = nn.ModuleList(
            _branch(channels, layers, norm=norm, reduces=False, pad=True) for layers in branches
        )
        inner = sum(layers[-1][1] for layers in branches)
        self.project = make_conv(inner, channels, 1, bias=True)
        self.scale = scale
        self.relu = relu
        if se is not None:
            self.placement, self.se = se.placement, se.operator(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, channels, H, W)``."""
        entered = self._enter(x)
        residual = self.project(torch.cat([branch(entered) for branch in self.branches], dim=1))
        out = self._sum(residual, x, self.scale)
        return self._leave(F.relu_(out) if self.relu else out)


def build_inception_resnet_v2(
    *,
    padding: str = "valid",
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build Inception-ResNet-v2, whose feature maps "stem" and "res2" both have stride 4.

    Args:
        padding: Padding of convolutions and pools: "valid", as in the published network, or "same",
            which aligns feature maps with the image.
        se: SE variant; None builds the network without SE.
        norm: Detectron2 norm name, such as "BN".
        in_channels: Number of image channels.
        out_features: Names of the stages whose outputs are returned; None for the last stage.
        freeze_at: Number of stages to freeze, counted from the stem.

    Raises:
        UserError: If ``padding`` is invalid or the network does not support the SE variant.
    """
    check_choice("The padding", padding, PADDINGS)
    check_se(se, "Inception-ResNet-v2", stages=(3, 4, 5), placements=PLACEMENTS)
    pad = padding == "same"
    stem = Chain(
        ConvBlock(in_channels, 32, 3, stride=2, norm=norm, pad=pad),
        ConvBlock(32, 32, 3, norm=norm, pad=pad),
        ConvBlock(32, 64, 3, norm=norm),
        MaxPool(64, padding=int(pad)),
    )
    stages: list[list[CNNBlockBase]] = [
        [ConvBlock(64, 80, 1, norm=norm), ConvBlock(80, 192, 3, norm=norm, pad=pad)]
    ]
    for stage in (3, 4, 5):
        inputs = stages[-1][-1].out_channels
        stages.append(_stage(stage, inputs, norm=norm, pad=pad, se=stage_se(se, stage)))
    stages[-1].append(ConvBlock(stages[-1][-1].out_channels, 1536, 1, norm=norm))
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


def _stage(
    stage: int, inputs: int, *, norm: str, pad: bool, se: SEOptions | None
) -> list[CNNBlockBase]:
    """Build one of the stages res3 to res5, without the last convolution of res5."""
    blocks: list[CNNBlockBase] = [MaxPool(inputs, padding=int(pad))] if stage == 3 else []
    projection = 64 if stage == 3 else 0
    blocks.append(MixedBlock(inputs, MIXED[stage], projection=projection, norm=norm, pad=pad))
    channels = blocks[-1].out_channels
    for index in range(COUNTS[stage]):
        # The last block of res5 adds its residual without scaling and has no ReLU.
        last = stage == 5 and index == COUNTS[stage] - 1
        blocks.append(
            InceptionResidualBlock(
                channels,
                RESIDUAL[stage],
                scale=1.0 if last else SCALES[stage],
                relu=not last,
                norm=norm,
                se=se,
            )
        )
    return blocks


# The sizes come from section 5 of the SENet paper, mean and std from the published weights.
_PREPROCESSING = Preprocessing(
    mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5), resize=352, crop=299
)

register_with_se(
    "inception_resnet_v2", build_inception_resnet_v2, dropout=0.2, preprocessing=_PREPROCESSING
)
