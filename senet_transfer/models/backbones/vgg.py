"""VGG-16 with batch norm, with and without SE.

Network: Simonyan and Zisserman 2015, configuration D, with a norm after every convolution (Ioffe
and Szegedy 2015), as in torchvision's ``vgg16_bn``. The convolutions have no biases, because the
norms cancel them. The classifier has two hidden layers of 4096 units; see :class:`VGGNeck`.

With SE (section 3.3 and Table II of the SENet paper), a gate follows the ReLU of each of the 13
convolutions. The convolutions of the stem (conv1 and conv2) count as stage 2. The hidden layers of
the classifier have no gates. With r = 16 and 1000 classes, the gates add 230,792 parameters to the
plain network's 138,361,768 (torchvision's 138,365,992 include 4,224 convolution biases).
"""

import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import build_backbone, check_se, stage_se
from senet_transfer.models.backbones.common import Chain, MaxPool, make_conv
from senet_transfer.models.registry import register_with_se

# Channels of the convolutions between pools; the first two groups form the stem.
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGBlock(CNNBlockBase):
    """3x3 convolution with norm and ReLU, optionally preceded by a max pool and followed by SE."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        pool: bool = False,
        norm: str = "BN",
        se: SEOptions | None = None,
    ):
        """
        Args:
            in_channels: Number of input channels.
            out_channels: Number of output channels.
            pool: Whether the block starts with a 2x2 max pool of stride 2.
            norm: Detectron2 norm name, such as "BN".
            se: SE variant; None for a block without SE.
        """
        super().__init__(in_channels, out_channels, 2 if pool else 1)
        self.pool = pool
        self.conv = make_conv(in_channels, out_channels, 3, norm=norm, relu=True)
        self.se = None if se is None else se.operator(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        x = self.conv(F.max_pool2d(x, 2) if self.pool else x)
        return x if self.se is None else self.se(x)


class VGGNeck(nn.Module):
    """Layers between VGG's last feature map and its classifier: pooling and two hidden layers.

    The feature map is pooled to 7x7, as in torchvision. For images of 224x224 pixels, it already
    has this size.

    Attributes:
        out_channels: Number of features per image.
        side: Side length of the pooled feature map.
    """

    out_channels = 4096
    side = 7

    def __init__(self, channels: int, *, dropout: float):
        """
        Args:
            channels: Number of channels of the feature map.
            dropout: Dropout probability between the two hidden layers.
        """
        super().__init__()
        self.fc1 = nn.Linear(channels * 7 * 7, self.out_channels)
        self.fc2 = nn.Linear(self.out_channels, self.out_channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, 4096)``."""
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)
        x = self.dropout(F.relu(self.fc1(x)))
        return F.relu(self.fc2(x))


def build_vgg(
    *,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build VGG-16.

    The feature "stem" is the output of conv2, which has stride 2. The feature "res4" is the output
    of conv5, and "res5" is the output of the last max pool.
    """
    check_se(se, "VGG-16", stages=(2, 3, 4))
    groups: list[list[CNNBlockBase]] = []
    inputs = in_channels
    for index, widths in enumerate(WIDTHS):
        blocks = []
        for position, width in enumerate(widths):
            pool = index > 0 and position == 0
            gate = stage_se(se, max(index, 2))
            blocks.append(VGGBlock(inputs, width, pool=pool, norm=norm, se=gate))
            inputs = width
        groups.append(blocks)
    stem = Chain(*groups[0], *groups[1])
    stages = [*groups[2:], [MaxPool(inputs, kernel=2)]]
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


register_with_se("vgg16_bn", build_vgg, dropout=0.5, neck=VGGNeck)
