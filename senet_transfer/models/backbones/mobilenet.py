"""MobileNet 1.0, with and without SE.

Network: Howard et al. 2017, "MobileNets", Table 1: depthwise 3x3 and pointwise 1x1 convolutions,
each with a norm and a ReLU.

With SE (Table III of the SENet paper), a gate follows the last ReLU of each of the 13 pairs of
depthwise and pointwise convolutions. The paper does not specify this position, but the 4.7M
parameters in the table imply it: with gates after the depthwise convolutions, there would be 4.6M.
With r = 16 and 1000 classes, the gates add 486,068 parameters to the plain network's 4,231,976. The
first pair is in stage res2.
"""

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor

from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import build_backbone, check_se, stage_se
from senet_transfer.models.backbones.common import make_conv
from senet_transfer.models.registry import register_with_se

# Number of channels and stride of each pair, by stage.
PAIRS = {
    2: ((64, 1), (128, 2), (128, 1)),
    3: ((256, 2), (256, 1)),
    4: ((512, 2), *((512, 1),) * 5),
    5: ((1024, 2), (1024, 1)),
}


class MobileNetStem(CNNBlockBase):
    """Stem with a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int = 3, out_channels: int = 32, *, norm: str = "BN"):
        super().__init__(in_channels, out_channels, 2)
        self.conv1 = make_conv(in_channels, out_channels, 3, stride=2, norm=norm, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 2, W / 2)``."""
        return self.conv1(x)


class SeparableBlock(CNNBlockBase):
    """Depthwise separable convolution, optionally followed by SE."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: str = "BN",
        se: SEOptions | None = None,
    ):
        """
        Args:
            in_channels: Number of input channels.
            out_channels: Number of output channels.
            stride: Stride of the depthwise convolution.
            norm: Detectron2 norm name, such as "BN".
            se: SE variant; None for a block without SE.
        """
        super().__init__(in_channels, out_channels, stride)
        self.depthwise = make_conv(
            in_channels, in_channels, 3, stride=stride, groups=in_channels, norm=norm, relu=True
        )
        self.pointwise = make_conv(in_channels, out_channels, 1, norm=norm, relu=True)
        self.se = None if se is None else se.operator(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        x = self.pointwise(self.depthwise(x))
        return x if self.se is None else self.se(x)


def build_mobilenet(
    *,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build MobileNet 1.0, whose feature maps "stem" to "res5" have strides 2, 4, 8, 16 and 32."""
    check_se(se, "MobileNet", stages=(2, 3, 4, 5))
    stem = MobileNetStem(in_channels, norm=norm)
    stages, inputs = [], stem.out_channels
    for stage, pairs in PAIRS.items():
        blocks = []
        for width, stride in pairs:
            gate = stage_se(se, stage)
            blocks.append(SeparableBlock(inputs, width, stride=stride, norm=norm, se=gate))
            inputs = width
        stages.append(blocks)
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


register_with_se("mobilenet", build_mobilenet)
