"""ResNet, ResNeXt and SENet-154, with and without SE, as instances of Detectron2's ``ResNet``.

Papers: He et al. 2016 (ResNet), Xie et al. 2017 (ResNeXt), and Hu et al. 2018 (SE). SENet-154
follows the authors' network definition. Backbones without SE use Detectron2's own blocks, with
fused kernels on a GPU.
"""

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.blocks import (
    PlainBasicBlock,
    PlainBottleneckBlock,
    ResNetStem,
    SEBasicBlock,
    SEBottleneckBlock,
    SENet154Block,
    SENet154Stem,
    UnpooledStem,
)
from senet_transfer.models.backbones.builder import build_backbone
from senet_transfer.models.registry import register_model, register_with_se

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def build_resnet(
    *,
    depth: int,
    num_groups: int = 1,
    width_per_group: int = 64,
    stride_in_1x1: bool = False,
    stem_pool: str = "pad",
    res5_dilation: int = 1,
    stem_out_channels: int = 64,
    res2_out_channels: int | None = None,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build a ResNet or ResNeXt.

    Args:
        depth: Number of layers: 18, 34, 50, 101 or 152.
        num_groups: Number of groups in the 3x3 convolutions; 32 for ResNeXt.
        width_per_group: Number of channels per group in res2.
        stride_in_1x1: Whether bottlenecks have their stride in the first 1x1 convolution.
        stem_pool: Border handling of the stem's max pool, "pad" or "ceil"; see :class:`ResNetStem`.
        res5_dilation: Dilation of res5: 1, or 2 to give res5 stride 16.
        stem_out_channels: Number of output channels of the stem.
        res2_out_channels: Number of output channels of res2, which doubles in each later stage.
            None uses 256, or 64 for depths 18 and 34.
        se: SE variant; None builds the network without SE.
        norm: Detectron2 norm name, such as "BN".
        in_channels: Number of image channels.
        out_features: Names of the stages whose outputs are returned; None for the last stage.
        freeze_at: Number of stages to freeze, counted from the stem.

    Raises:
        UserError: If a value is invalid for the network.
    """
    _check_blocks(depth, num_groups, width_per_group, stride_in_1x1, res5_dilation)
    channels = (stem_out_channels, res2_out_channels or (256 if depth >= 50 else 64))
    stages = _stages(
        depth, num_groups, width_per_group, channels, se, norm, stride_in_1x1, res5_dilation
    )
    stem = ResNetStem(in_channels, stem_out_channels, norm=norm, pool=stem_pool)
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


def _check_blocks(
    depth: int, num_groups: int, width_per_group: int, stride_in_1x1: bool, dilation: int
) -> None:
    """Raise a UserError if the options of the residual blocks are invalid."""
    if not isinstance(stride_in_1x1, bool):
        raise UserError(f"stride_in_1x1 is {stride_in_1x1!r}; expected True or False.")
    if num_groups < 1 or width_per_group < 1:
        raise UserError(
            f"num_groups is {num_groups} and width_per_group is {width_per_group}; expected 1 or "
            "more for both."
        )
    if depth not in BLOCKS_PER_STAGE:
        depths = ", ".join(map(str, BLOCKS_PER_STAGE))
        raise UserError(f"The depth of the ResNet is {depth!r}; expected one of: {depths}.")
    if dilation not in (1, 2):
        raise UserError(f"The dilation of res5 is {dilation!r}; expected 1 or 2.")
    if depth < 50 and (num_groups != 1 or dilation != 1 or stride_in_1x1):
        raise UserError(
            f"ResNet-{depth} has no bottlenecks and does not support groups, dilation or a stride "
            "in the 1x1 convolution. Set num_groups to 1, res5_dilation to 1 and stride_in_1x1 to "
            "False, or use depth 50 or more."
        )


def _stages(
    depth: int,
    num_groups: int,
    width_per_group: int,
    channels: tuple[int, int],
    se: SEOptions | None,
    norm: str,
    stride_in_1x1: bool,
    res5_dilation: int,
) -> list[list[CNNBlockBase]]:
    """Build the blocks of res2 to res5; see :func:`build_resnet`.

    ``channels`` contains the numbers of output channels of the stem and of res2.
    """
    bottleneck = depth >= 50
    inputs, outputs = channels
    stages = []
    for stage, blocks in zip((2, 3, 4, 5), BLOCKS_PER_STAGE[depth], strict=True):
        dilation = res5_dilation if stage == 5 else 1
        stride = 1 if stage == 2 or dilation == 2 else 2
        arguments: dict[str, object] = {
            "norm": norm,
            "stride_per_block": [stride] + [1] * (blocks - 1),
        }
        if bottleneck:
            arguments["bottleneck_channels"] = num_groups * width_per_group * 2 ** (stage - 2)
            arguments["num_groups"] = num_groups
            arguments["stride_in_1x1"] = stride_in_1x1
            arguments["dilation"] = dilation
        if se is not None and stage in se.stages:
            block = SEBottleneckBlock if bottleneck else SEBasicBlock
            arguments["se"] = se
        else:
            block = PlainBottleneckBlock if bottleneck else PlainBasicBlock
        stages.append(
            ResNet.make_stage(block, blocks, in_channels=inputs, out_channels=outputs, **arguments)
        )
        inputs, outputs = outputs, 2 * outputs
    return stages


def build_senet154(
    *,
    stem_pool: str = "pad",
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build SENet-154, which always has SE. See :func:`build_resnet` for the arguments.

    Raises:
        UserError: If any stage has no SE.
    """
    se = se or SEOptions()
    if set(se.stages) != {2, 3, 4, 5}:
        raise UserError(
            f"The stages with SE are {se.stages!r}, but SENet-154 has SE in every stage. Remove "
            "se_stages (MODEL.SE.STAGES in a config)."
        )
    stages = [
        ResNet.make_stage(
            SENet154Block,
            blocks,
            in_channels=128 if stage == 2 else 2 ** (5 + stage),
            out_channels=2 ** (6 + stage),
            stride_per_block=[1 if stage == 2 else 2] + [1] * (blocks - 1),
            norm=norm,
            se=se,
        )
        for stage, blocks in zip((2, 3, 4, 5), BLOCKS_PER_STAGE[152], strict=True)
    ]
    stem = SENet154Stem(in_channels, norm=norm, pool=stem_pool)
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


def build_places365_wideresnet18(
    *,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> ResNet:
    """Build the network for CSAIL's file ``wideresnet18_places365.pth.tar``.

    The network is ResNet-18 without the max pool of the stem, so its last feature map has stride 16
    (14x14 for 224x224 images). Despite its name, it is not wider than ResNet-18. Source:
    ``wideresnet.py`` in CSAILVision/places365. See :func:`build_resnet` for the arguments.
    """
    stages = _stages(18, 1, 64, (64, 64), se, norm, stride_in_1x1=False, res5_dilation=1)
    stem = UnpooledStem(in_channels, norm=norm)
    return build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at)


for _depth in BLOCKS_PER_STAGE:
    register_with_se(f"resnet{_depth}", build_resnet, depth=_depth)
for _depth in (50, 101):
    register_with_se(
        f"resnext{_depth}_32x4d", build_resnet, depth=_depth, num_groups=32, width_per_group=4
    )
register_model("places365_wideresnet18", build_places365_wideresnet18)
register_model("senet154", build_senet154, has_se=True, dropout=0.2)
