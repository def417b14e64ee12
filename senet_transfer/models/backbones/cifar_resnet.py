"""Pre-activation ResNets for CIFAR: ResNet-110, ResNet-164 and any other depth.

Networks: He et al. 2016, "Identity Mappings in Deep Residual Networks", and their released code:
the first block of every stage has its norm and ReLU before both its branch and its shortcut, a
shortcut of basic blocks that changes shape has no parameters (option A), that of bottlenecks is a
1x1 convolution, and the stride of a bottleneck is in its first 1x1 convolution.

With SE (the paper's Tables IV and V), every block gates its residual branch; other placements as in
:mod:`senet_transfer.models.backbones.cifar_blocks`. The paper doesn't say whether its r = 16 holds
at 16 channels, where it leaves one hidden unit; it does here, and ``se_ratio`` takes others. SE
adds ``2 C (C // r) + C + C // r`` parameters a block of width C. With r = 16 and 10 classes that is
14,238 to ResNet-110's 1,727,962 and 202,104 to ResNet-164's 1,703,258.
"""

from detectron2.modeling.backbone.resnet import ResNet

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import CIFAR_FEATURES, build_backbone
from senet_transfer.models.backbones.cifar_blocks import preact_parts
from senet_transfer.models.registry import register_family, register_with_se
from senet_transfer.preprocessing import CIFAR10

BLOCKS = ("basic", "bottleneck")

# The depths that the paper gives for bottlenecks; they mean these without being told.
BOTTLENECK_DEPTHS = (164, 1001)


def build_cifar_resnet(
    *,
    depth: int,
    block: str | None = None,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build a pre-activation ResNet with stages res2 to res4, of strides 1, 2 and 4.

    Only res4 ends with a norm and ReLU, as in the network.

    Args:
        depth: layers with weights: 6n + 2 of basic blocks, 9n + 2 of bottlenecks.
        block: "basic" or "bottleneck"; None is bottlenecks for depth 164 and 1001, else basic.
        se: the SE variant; None is the plain network.
        norm: Detectron2's name of a norm.
        in_channels: channels of the image.
        out_features: names of the stages to return; None is the last one.
        freeze_at: number of stages to freeze, counted from the stem.

    Raises:
        UserError: no network of these blocks has this depth.
    """
    if block is not None:
        check_choice("The block", block, BLOCKS)
    bottleneck = depth in BOTTLENECK_DEPTHS if block is None else block == "bottleneck"
    kind, layers = ("bottlenecks", 9) if bottleneck else ("basic blocks", 6)
    blocks, rest = divmod(depth - 2, layers)
    if rest or blocks < 1:
        near = max(round((depth - 2) / layers), 1) * layers + 2
        raise UserError(
            f"A CIFAR ResNet of {kind} has {layers}n + 2 layers, so {depth} is none. The nearest "
            f"is {near}; block= takes the other kind of block."
        )
    stem, stages = preact_parts(
        widths=(64, 128, 256) if bottleneck else (16, 32, 64),
        blocks=blocks,
        in_channels=in_channels,
        se=se,
        norm=norm,
        bottleneck=bottleneck,
        projection=bottleneck,
        shares=True,
    )
    return build_backbone(
        stem, stages, out_features=out_features, freeze_at=freeze_at, features=CIFAR_FEATURES
    )


for _depth in (110, 164):
    register_with_se(
        f"cifar_resnet{_depth}", build_cifar_resnet, preprocessing=CIFAR10, depth=_depth
    )
register_family(r"cifar_resnet(?P<depth>[1-9]\d{0,3})", build_cifar_resnet, preprocessing=CIFAR10)
