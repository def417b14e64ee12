"""Wide ResNets for CIFAR, such as WRN-16-8.

The networks follow Zagoruyko and Komodakis 2016, "Wide Residual Networks", and their released code.
They consist of pre-activation blocks with two 3x3 convolutions, without dropout. If a block changes
the shape, its shortcut is a 1x1 convolution that follows the block's first norm and ReLU.

With SE (Tables IV and V of the SENet paper), every block gates its residual branch; for other
placements, see :mod:`senet_transfer.models.backbones.cifar_blocks`. SE adds
``2 C (C // r) + C + C // r`` parameters per block with C channels. With r = 16 and 10 classes, it
adds 87,920 parameters to WRN-16-8's 10,961,370.
"""

from detectron2.modeling.backbone.resnet import ResNet

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import CIFAR_FEATURES, build_backbone
from senet_transfer.models.backbones.cifar_blocks import preact_parts
from senet_transfer.models.registry import register_family, register_with_se
from senet_transfer.preprocessing import CIFAR10


def build_wide_resnet(
    *,
    depth: int,
    width: int,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build a wide ResNet with stages res2 to res4.

    The outputs of these stages have strides 1, 2 and 4 relative to the input image. Only res4 ends
    with a norm and a ReLU.

    Args:
        depth: Number of layers, 6n + 4, including the shortcut convolutions as in the paper.
        width: Widening factor k; the stages have 16k, 32k and 64k channels.
        se: SE variant; None builds the network without SE.
        norm: Detectron2 norm name, such as "BN".
        in_channels: Number of image channels.
        out_features: Names of the stages whose outputs are returned; None for the last stage.
        freeze_at: Number of stages to freeze, counted from the stem.

    Raises:
        UserError: If the depth or width is invalid, or the SE variant is not supported.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1 or width < 1:
        near = max(round((depth - 4) / 6), 1) * 6 + 4
        raise UserError(
            f"WRN-{depth}-{width} can't be built: a wide ResNet has 6n + 4 layers and a width of "
            f"at least 1. The nearest valid depth is {near}."
        )
    stem, stages = preact_parts(
        widths=(16 * width, 32 * width, 64 * width),
        blocks=blocks,
        in_channels=in_channels,
        se=se,
        norm=norm,
    )
    return build_backbone(
        stem, stages, out_features=out_features, freeze_at=freeze_at, features=CIFAR_FEATURES
    )


register_with_se("wrn16_8", build_wide_resnet, preprocessing=CIFAR10, depth=16, width=8)
register_family(
    r"wrn(?P<depth>[1-9]\d{0,3})_(?P<width>[1-9]\d{0,2})", build_wide_resnet, preprocessing=CIFAR10
)
