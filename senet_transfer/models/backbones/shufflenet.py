"""ShuffleNet 1x with 3 groups, with and without SE.

Network: Zhang et al. 2018, "ShuffleNet", Table 1 and Figure 2. Pointwise convolutions are grouped,
and their channels are shuffled before a depthwise 3x3 convolution. In units with stride 2, the
shortcut is an average pool, and is concatenated with the branch instead of being added to it.

With SE (Table III of the SENet paper), each of the 16 units gates its residual branch, after its
last norm and before the sum or the concatenation. The paper does not specify the position. With
r = 16 and 1000 classes, the gates add 618,805 parameters to the 1,865,728 parameters of the network
without SE. The totals agree with the table, which lists 1.8M and 2.4M, if its values are truncated
rather than rounded. With gates on the concatenated output of the units with stride 2, the total
would be 2.5M.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor

from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import build_backbone, check_se, stage_se
from senet_transfer.models.backbones.common import GatedBlock, MaxPool, make_conv
from senet_transfer.models.backbones.mobilenet import MobileNetStem
from senet_transfer.models.registry import register_with_se

PLACEMENTS = ("standard", "pre", "post", "identity")

STEM_CHANNELS = 24

# Number of channels and number of units, by stage.
STAGES = {3: (240, 4), 4: (480, 8), 5: (960, 4)}


class ShuffleUnit(GatedBlock):
    """ShuffleNet unit, optionally with SE."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        num_groups: int = 3,
        first_groups: int | None = None,
        norm: str = "BN",
        se: SEOptions | None = None,
    ):
        """
        Args:
            in_channels: Number of input channels.
            out_channels: Number of output channels.
            stride: Stride of the unit: 1, or 2 for a unit that concatenates its shortcut.
            num_groups: Number of groups in the pointwise convolutions.
            first_groups: Number of groups in the first pointwise convolution; None uses
                ``num_groups``.
            norm: Detectron2 norm name, such as "BN".
            se: SE variant; None for a unit without SE.
        """
        super().__init__(in_channels, out_channels, stride)
        inner = out_channels // 4
        residual = out_channels - in_channels if stride == 2 else out_channels
        self.num_groups = num_groups
        self.compress = make_conv(
            in_channels, inner, 1, groups=first_groups or num_groups, norm=norm, relu=True
        )
        self.depthwise = make_conv(inner, inner, 3, stride=stride, groups=inner, norm=norm)
        self.expand = make_conv(inner, residual, 1, groups=num_groups, norm=norm)
        if se is not None:
            # Number of channels of the gated tensor. All other placements gate the input or the
            # shortcut, which have in_channels channels.
            channels = {"standard": residual, "post": out_channels}
            self.placement = se.placement
            self.se = se.operator(channels.get(se.placement, in_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = self.compress(self._enter(x))
        out = self.expand(self.depthwise(shuffle(out, self.num_groups)))
        if self.stride == 1:
            return self._leave(F.relu_(self._sum(out, x)))
        shortcut = F.avg_pool2d(x, 3, stride=2, padding=1)
        if self.se is not None and self.placement == "standard":
            out = self.se(out)
        elif self.se is not None and self.placement == "identity":
            shortcut = self.se(shortcut)
        return self._leave(F.relu_(torch.cat([shortcut, out], dim=1)))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of all groups in a feature map ``(N, C, H, W)``."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def build_shufflenet(
    *,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build ShuffleNet 1x with 3 groups.

    The feature "stem" has stride 2; "res2" is the output of the max pool, with stride 4; "res3" to
    "res5" are stages 2 to 4 in ShuffleNet's paper.
    """
    check_se(se, "ShuffleNet", stages=(3, 4, 5), placements=PLACEMENTS)
    stem = MobileNetStem(in_channels, STEM_CHANNELS, norm=norm)
    stages, inputs = [[MaxPool(STEM_CHANNELS, padding=1)]], STEM_CHANNELS
    for stage, (width, units) in STAGES.items():
        blocks = []
        for index in range(units):
            blocks.append(
                ShuffleUnit(
                    inputs,
                    width,
                    stride=2 if index == 0 else 1,
                    # As in the paper, the first convolution is not grouped, because its input has
                    # few channels.
                    first_groups=1 if inputs == STEM_CHANNELS else None,
                    norm=norm,
                    se=stage_se(se, stage),
                )
            )
            inputs = width
        stages.append(blocks)
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


register_with_se("shufflenet_g3", build_shufflenet)
