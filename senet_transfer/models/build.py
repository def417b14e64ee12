"""Construction of backbones from a Detectron2 config."""

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import fields, replace
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ROI_HEADS_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.resnet import build_resnet
from senet_transfer.models.registry import NORMS, ModelEntry, build_backbone, model_entry
from senet_transfer.utils.private_api import set_size_divisibility

# Names of the builder functions for backbones with an FPN.
FPN_BUILDERS = ("build_senet_fpn_backbone", "build_retinanet_senet_fpn_backbone")

logger = logging.getLogger(__name__)

# Whether the code that builds a model also loads and checks its weights.
_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


@contextlib.contextmanager
def weights_follow() -> Iterator[None]:
    """Suppress the FrozenBN warning of a model whose weights are loaded after it is built."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def backbone_from_config(cfg: CfgNode) -> tuple[ModelEntry, dict[str, Any]]:
    """Return the registered model that a config specifies, and the options for building it.

    Raises:
        UserError: If config keys contradict each other or are not supported by the model.
    """
    entry = _named_entry(cfg) if cfg.MODEL.BACKBONE.ARCH else _described_entry(cfg)
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise UserError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE enables deformable convolutions, which these "
            "backbones don't support. Set it to False for all stages, or use Detectron2's "
            "build_resnet_backbone."
        )
    values = {
        "stem_pool": cfg.MODEL.RESNETS.STEM_POOL,
        "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
        "res5_dilation": cfg.MODEL.RESNETS.RES5_DILATION,
        "padding": cfg.MODEL.BACKBONE.PADDING or "same",
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
    }
    if entry.fixed.get("depth") in (18, 34):
        # Basic blocks ignore this key, as in Detectron2, where its default is True.
        values.pop("stride_in_1x1")
    options = {key: value for key, value in values.items() if key in entry.options()}
    options["norm"] = cfg.MODEL.RESNETS.NORM
    options["fused"] = cfg.MODEL.SE.FUSED
    if entry.has_se:
        for field in fields(SEOptions):
            options[f"se_{field.name}"] = cfg.MODEL.SE[field.name.upper()]
    return entry, options


def backbone_name(cfg: CfgNode) -> str:
    """Return the name of the backbone that a config specifies.

    If the config describes a ResNet or ResNeXt, this is the network's name, such as
    ``"se_resnext50_32x4d"``. The name is not validated, and there may be no registered model with
    this name.
    """
    has_se, name = bool(cfg.MODEL.SE.ENABLED), cfg.MODEL.BACKBONE.ARCH
    if name:
        return f"se_{name}" if has_se and not name.startswith("se") else name
    resnets = cfg.MODEL.RESNETS
    if resnets.NUM_GROUPS > 1:
        name = f"resnext{resnets.DEPTH}_{resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d"
    else:
        name = f"resnet{resnets.DEPTH}"
    return f"se_{name}" if has_se else name


def _named_entry(cfg: CfgNode) -> ModelEntry:
    entry = model_entry(cfg.MODEL.BACKBONE.ARCH)
    if entry.has_se and cfg.MODEL.SE.ENABLED is False:
        raise UserError(
            f"MODEL.BACKBONE.ARCH is {entry.name}, which has SE, but MODEL.SE.ENABLED is False. "
            "Set ARCH to the network without SE, or remove MODEL.SE.ENABLED."
        )
    if cfg.MODEL.SE.ENABLED and entry.network:
        raise UserError(
            f"MODEL.SE.ENABLED is True, but timm determines whether {entry.name} has SE layers. "
            "Set MODEL.SE.ENABLED to None, or use one of this project's networks."
        )
    if cfg.MODEL.SE.ENABLED and not entry.has_se:
        return model_entry(f"se_{entry.name}")
    return entry


def _described_entry(cfg: CfgNode) -> ModelEntry:
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS > 64:
        # Detectron2's default, 256, is for bottlenecks.
        raise UserError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}; expected 64 for "
            f"ResNet-{resnets.DEPTH}, or fewer for a narrower network. Set it to 64, or set "
            "MODEL.BACKBONE.ARCH to the name of the network."
        )
    return ModelEntry(
        name="MODEL.RESNETS",
        build=build_resnet,
        fixed={
            "depth": resnets.DEPTH,
            "num_groups": resnets.NUM_GROUPS,
            "width_per_group": resnets.WIDTH_PER_GROUP,
            "stem_out_channels": resnets.STEM_OUT_CHANNELS,
            "res2_out_channels": resnets.RES2_OUT_CHANNELS,
        },
        has_se=bool(cfg.MODEL.SE.ENABLED),
    )


@BACKBONE_REGISTRY.register()
def build_senet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a backbone without FPN from a config.

    The backbone returns the feature maps listed in ``MODEL.RESNETS.OUT_FEATURES``, or only the last
    one if the list is empty.
    """
    entry, options = backbone_from_config(cfg)
    if cfg.MODEL.RESNETS.NORM == "FrozenBN" and not _weights_follow.get():
        logger.warning(
            "MODEL.RESNETS.NORM is FrozenBN, so the batch norm layers of %s have mean 0 and "
            "variance 1 (no normalisation) until pretrained weights are loaded. Detectron2's "
            "DetectionCheckpointer can't load published weights by their names, or weight files of "
            "other projects. To load such weights, call senet_transfer.apply_file_geometry(cfg) "
            "before building the model, and senet_transfer.load_weights(model, cfg.MODEL.WEIGHTS) "
            "afterwards.",
            backbone_name(cfg),
        )
    backbone = build_backbone(
        entry,
        out_features=list(cfg.MODEL.RESNETS.OUT_FEATURES) or None,
        in_channels=input_shape.channels,
        **options,
    )
    backbone.preprocessing = replace(
        entry.preprocessing,
        format=cfg.INPUT.FORMAT,
        mean=tuple(cfg.MODEL.PIXEL_MEAN),
        std=tuple(cfg.MODEL.PIXEL_STD),
    )
    return backbone


@BACKBONE_REGISTRY.register()
def build_senet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a backbone and an FPN with levels p2 to p6, for Faster R-CNN and Mask R-CNN."""
    return _fpn(cfg, build_senet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_senet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a backbone and an FPN with levels p6 and p7 computed from res5, for RetinaNet."""
    backbone = build_senet_backbone(cfg, input_shape)
    _check_fpn_features(backbone, ["res5"])
    top = LastLevelP6P7(backbone.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return _fpn(cfg, backbone, top)


def _fpn(cfg: CfgNode, backbone: Backbone, top_block: nn.Module) -> FPN:
    if getattr(getattr(backbone, "stem", None), "pool", "") == "none":
        raise UserError(
            f"MODEL.BACKBONE.ARCH is {cfg.MODEL.BACKBONE.ARCH}, which is for classification only: "
            "without a max pool in the stem, its feature maps have strides 2 to 16, but an FPN "
            "requires strides 4 to 32. Use resnet18."
        )
    if cfg.MODEL.BACKBONE.PADDING == "valid":
        raise UserError(
            "MODEL.BACKBONE.PADDING is 'valid'; expected 'same' or empty for an FPN. An FPN adds "
            "feature maps of two resolutions pixel by pixel, and they are not aligned without "
            "padding. Set it to 'same'."
        )
    _check_fpn_features(backbone, cfg.MODEL.FPN.IN_FEATURES)
    check_choice("MODEL.FPN.NORM", cfg.MODEL.FPN.NORM, ("", *NORMS))
    check_choice("MODEL.FPN.FUSE_TYPE", cfg.MODEL.FPN.FUSE_TYPE, ("sum", "avg"))
    fpn = FPN(
        bottom_up=backbone,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    if multiple := cfg.INPUT.SIZE_DIVISIBILITY:
        if multiple % fpn.size_divisibility:
            raise UserError(
                f"INPUT.SIZE_DIVISIBILITY is {multiple}; expected 0 or a multiple of the FPN's "
                f"largest stride, {fpn.size_divisibility}."
            )
        set_size_divisibility(fpn, multiple)
    return fpn


def _check_fpn_features(backbone: Backbone, names: list[str]) -> None:
    shapes = backbone.output_shape()
    missing = [name for name in names if name not in shapes]
    strides = [shapes[name].stride for name in names if name in shapes]
    doubling = all(b == 2 * a for a, b in zip(strides, strides[1:], strict=False))
    if not missing and names and not doubling:
        raise UserError(
            f"The input features of the FPN, {list(names)}, have the strides {strides}, but each "
            "stride must be twice the previous one. Set MODEL.FPN.IN_FEATURES to consecutive "
            "stages in the order of the network, and MODEL.RESNETS.RES5_DILATION to 1."
        )
    if missing or not names:
        raise UserError(
            f"The input features of the FPN are {list(names)}, but the backbone returns "
            f"{list(backbone.output_shape())}. Set MODEL.RESNETS.OUT_FEATURES and "
            "MODEL.FPN.IN_FEATURES to the same stages, usually ['res2', 'res3', 'res4', 'res5']."
        )


@ROI_HEADS_REGISTRY.register()
class SENetRes5ROIHeads(Res5ROIHeads):
    """Detectron2's C4 head, with res5 built from the config's backbone.

    Detectron2's ``Res5ROIHeads`` always builds res5 from bottlenecks without SE. With an SE
    backbone, the last stage would therefore have no gates, and no error would be raised.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        # Build the whole backbone and keep only its last stage. A separate description of this
        # stage could get out of sync with the backbone.
        entry, options = backbone_from_config(cfg)
        if entry.network:
            raise UserError(
                f"MODEL.BACKBONE.ARCH is {entry.name}, but a detector with a C4 head requires one "
                "of this project's networks. Use such a network, or a detector with an FPN."
            )
        backbone = build_backbone(entry, out_features=["res5"], **{**options, "freeze_at": 0})
        return backbone.res5, backbone.output_shape()["res5"].channels
