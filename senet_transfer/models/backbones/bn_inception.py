"""BN-Inception, with and without SE.

Paper: Ioffe and Szegedy, "Batch Normalization" (2015). The layers follow the SENet authors' network
definition. It differs from the paper's figure in two channel counts and in the max pool of the last
module. Max pools with stride 2 have no padding, and their last window is clipped at the edge.

With SE, a gate is applied to the concatenated branches of each module, as in Figure 2 of the SENet
paper and in the authors' released SE-BN-Inception. All ten modules have a gate, including those
with stride 2. With r = 16 and 1000 classes, the gates add 646,398 parameters to the 11,285,224
parameters of the network without SE.

Modules are assigned to stages by the resolution of their output: 3a and 3b are in res3, 3c to 4d in
res4, and 4e to 5b in res5. Stage res2 consists of two convolutions and has no gate.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.blocks import ResNetStem
from senet_transfer.models.backbones.builder import build_backbone, check_se, stage_se
from senet_transfer.models.backbones.common import MaxPool, make_conv
from senet_transfer.models.registry import register_with_se

# Channels of the convolutions in each module's branches (1x1; 1x1 and 3x3; 1x1 and two 3x3; 1x1
# after the pool), and the pool type. Modules with stride 2 have neither the first branch nor the
# convolution after the pool.
MODULES = {
    3: (
        (64, (64, 64), (64, 96), 32, "avg"),
        (64, (64, 96), (64, 96), 64, "avg"),
    ),
    4: (
        (0, (128, 160), (64, 96), 0, "max"),
        (224, (64, 96), (96, 128), 128, "avg"),
        (192, (96, 128), (96, 128), 128, "avg"),
        (160, (128, 160), (128, 160), 128, "avg"),
        (96, (128, 192), (160, 192), 128, "avg"),
    ),
    5: (
        (0, (128, 192), (192, 256), 0, "max"),
        (352, (192, 320), (160, 224), 128, "avg"),
        (352, (192, 320), (192, 224), 128, "max"),
    ),
}


class ConvPair(CNNBlockBase):
    """Block with a 1x1 and a 3x3 convolution, which precedes the Inception modules."""

    def __init__(self, in_channels: int, inner: int, out_channels: int, *, norm: str):
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = make_conv(in_channels, inner, 1, norm=norm, relu=True)
        self.conv2 = make_conv(inner, out_channels, 3, norm=norm, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``."""
        return self.conv2(self.conv1(x))


class InceptionBlock(CNNBlockBase):
    """Inception module, optionally with SE on its concatenated branches."""

    def __init__(
        self,
        in_channels: int,
        one: int,
        three: tuple[int, int],
        double: tuple[int, int],
        projection: int,
        pool: str,
        *,
        norm: str = "BN",
        se: SEOptions | None = None,
    ):
        """
        Args:
            in_channels: Number of input channels.
            one: Channels of the 1x1 branch; 0 builds a module with stride 2 and without this
                branch.
            three: Channels of the 1x1 and the 3x3 convolution in the second branch.
            double: Channels of the 1x1 and of each 3x3 convolution in the third branch.
            projection: Channels of the 1x1 convolution after the pool; 0 omits this convolution.
            pool: Pool type, "avg" or "max".
            norm: Detectron2 norm name, such as "BN".
            se: SE variant; None for a module without SE.
        """
        outputs = one + three[1] + double[1] + (projection or in_channels)
        stride = 1 if one else 2
        super().__init__(in_channels, outputs, stride)
        self.pool = pool

        def conv(inputs: int, width: int, kernel: int, stride: int = 1) -> nn.Module:
            return make_conv(inputs, width, kernel, stride=stride, norm=norm, relu=True)

        self.branch_1x1 = conv(in_channels, one, 1) if one else None
        self.branch_3x3 = nn.Sequential(
            conv(in_channels, three[0], 1), conv(three[0], three[1], 3, stride)
        )
        self.branch_double = nn.Sequential(
            conv(in_channels, double[0], 1),
            conv(double[0], double[1], 3),
            conv(double[1], double[1], 3, stride),
        )
        self.branch_pool = conv(in_channels, projection, 1) if projection else None
        self.se = None if se is None else se.operator(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        pooled = self._pooled(x)
        branches = [
            None if self.branch_1x1 is None else self.branch_1x1(x),
            self.branch_3x3(x),
            self.branch_double(x),
            pooled if self.branch_pool is None else self.branch_pool(pooled),
        ]
        x = torch.cat([branch for branch in branches if branch is not None], dim=1)
        return x if self.se is None else self.se(x)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            # If a side is odd, the pool and the convolutions of the original definition give
            # feature maps of different sizes. Padding the pool's input on odd sides avoids this.
            odd = (x.shape[2] % 2, x.shape[3] % 2)
            return F.max_pool2d(x, 3, stride=2, padding=odd, ceil_mode=True)
        pool = F.avg_pool2d if self.pool == "avg" else F.max_pool2d
        return pool(x, 3, stride=1, padding=1)


def build_bn_inception(
    *,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build BN-Inception.

    The feature maps "stem" and "res2" have stride 4. The feature map "res3" is the output of
    Inception module 3b, and "res4" is the output of module 4d.
    """
    check_se(se, "BN-Inception", stages=(3, 4, 5))
    stages: list[list[CNNBlockBase]] = [[ConvPair(64, 64, 192, norm=norm)]]
    inputs = 192
    for stage, modules in MODULES.items():
        blocks: list[CNNBlockBase] = [MaxPool(inputs, ceil=True)] if stage == 3 else []
        for module in modules:
            blocks.append(InceptionBlock(inputs, *module, norm=norm, se=stage_se(se, stage)))
            inputs = blocks[-1].out_channels
        stages.append(blocks)
    stem = ResNetStem(in_channels, norm=norm, pool="ceil")
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


register_with_se("bn_inception", build_bn_inception)
