"""Pre-activation ResNets for CIFAR, such as ResNet-110 and ResNet-164.

Networks: He et al. 2016, "Identity Mappings in Deep Residual Networks", and their released code. In
the first block of every stage, the first norm and ReLU precede both the branch and the shortcut. A
shortcut that changes the shape has no parameters in basic blocks (option A) and is a 1x1
convolution in bottlenecks. The stride of a bottleneck is in its first 1x1 convolution.

With SE (Tables IV and V of the SENet paper), every block gates its residual branch; for other
placements, see :mod:`senet_transfer.models.backbones.cifar_blocks`. The paper does not specify
whether r = 16 also applies to gates with 16 channels, which then have a single hidden unit. By
default, this module uses r = 16 for all gates; ``se_ratio`` changes the ratio. SE adds
``2 C (C // r) + C + C // r`` parameters per block with C channels. With r = 16 and 10 classes, it
adds 14,238 parameters to ResNet-110's 1,727,962 and 202,104 parameters to ResNet-164's 1,703,258.
"""

from detectron2.modeling.backbone.resnet import ResNet

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import CIFAR_FEATURES, build_backbone
from senet_transfer.models.backbones.cifar_blocks import preact_parts
from senet_transfer.models.registry import register_family, register_with_se
from senet_transfer.preprocessing import CIFAR10

BLOCKS = ("basic", "bottleneck")

# Depths for which bottlenecks are the default, as in the paper.
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
    """Build a pre-activation ResNet with stages res2 to res4.

    The outputs of these stages have strides 1, 2 and 4 relative to the input image. Only res4 ends
    with a norm and a ReLU.

    Args:
        depth: Number of layers with weights: 6n + 2 with basic blocks, 9n + 2 with bottlenecks.
        block: Block type, "basic" or "bottleneck". None uses bottlenecks for depths 164 and 1001,
            and basic blocks for other depths.
        se: SE variant; None builds the network without SE.
        norm: Detectron2 norm name, such as "BN".
        in_channels: Number of image channels.
        out_features: Names of the stages whose outputs are returned; None for the last stage.
        freeze_at: Number of stages to freeze, counted from the stem.

    Raises:
        UserError: If the depth is invalid for this block type.
    """
    if block is not None:
        check_choice("The block", block, BLOCKS)
    bottleneck = depth in BOTTLENECK_DEPTHS if block is None else block == "bottleneck"
    kind, layers = ("bottlenecks", 9) if bottleneck else ("basic blocks", 6)
    blocks, rest = divmod(depth - 2, layers)
    if rest or blocks < 1:
        near = max(round((depth - 2) / layers), 1) * layers + 2
        raise UserError(
            f"The depth is {depth}, but a CIFAR ResNet with {kind} has {layers}n + 2 layers. The "
            f"nearest valid depth is {near}. Set depth to this value, or set block to the other "
            "block type."
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
