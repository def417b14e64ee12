"""Configs that let unmodified Detectron2 build a detector trained with this project."""

import inspect
from typing import Any

from detectron2.config import CfgNode, get_cfg

from senet_transfer.config import config_items, config_value
from senet_transfer.config.defaults import AUTO_KEYS, set_config_value
from senet_transfer.errors import UserError
from senet_transfer.models.backbones.resnet import build_resnet
from senet_transfer.models.build import backbone_from_config, backbone_name
from senet_transfer.models.registry import ModelEntry

# Names of parts in this project's configs, and Detectron2's names for the same parts without SE.
_NAMES = {
    "MODEL.BACKBONE.NAME": {
        "build_senet_backbone": "build_resnet_backbone",
        "build_senet_fpn_backbone": "build_resnet_fpn_backbone",
        "build_retinanet_senet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
    },
    "MODEL.ROI_HEADS.NAME": {"SENetRes5ROIHeads": "Res5ROIHeads"},
}


def detectron2_config(cfg: CfgNode, weights: str) -> CfgNode:
    """Convert a detector's config to a config that contains only Detectron2's own keys.

    The detector's backbone must be a ResNet or ResNeXt without SE, or one of Detectron2's own.

    Args:
        cfg: The detector's config. Its architecture and preprocessing keys must match the weights.
        weights: The path of the weights in Detectron2's format, for ``MODEL.WEIGHTS``.

    Raises:
        UserError: If unmodified Detectron2 can't build the detector, or would give other results.
    """
    if cfg.MODEL.BACKBONE.NAME in _NAMES["MODEL.BACKBONE.NAME"]:
        entry, options = backbone_from_config(cfg)
        if entry.has_se:
            raise UserError(
                f"The detector's backbone is {backbone_name(cfg)}. Detectron2's own backbones do "
                "not support SE, so the detector can't be converted. Use the checkpoint as it is, "
                "in a three-line script that imports senet_transfer. docs/detectron2.md contains "
                "such scripts for Detectron2's demo and for SAHI."
            )
        resnets = _resnet_keys(entry)
        problems = _problems(cfg, entry, options, resnets)
    else:  # Detectron2's own backbone is used.
        resnets, problems = {}, _input_problems(cfg)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"The detector can't be converted, because unmodified Detectron2 does not support "
            f"it:\n{lines}\nUse the checkpoint in a script that imports senet_transfer; see "
            "docs/detectron2.md."
        )
    theirs = get_cfg()
    for key, default in config_items(theirs):
        value = config_value(cfg, key)
        set_config_value(theirs, key, default if key in AUTO_KEYS and value == "auto" else value)
    for key, names in _NAMES.items():
        name = config_value(cfg, key)
        set_config_value(theirs, key, names.get(name, name))
    for key, value in resnets.items():
        theirs.MODEL.RESNETS[key] = value
    theirs.MODEL.WEIGHTS = weights
    theirs.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    return theirs


def _resnet_keys(entry: ModelEntry) -> dict[str, Any]:
    """Return the ``MODEL.RESNETS`` keys for a ResNet. For other backbones, return an empty dict."""
    if entry.build is not build_resnet:
        return {}
    defaults = {
        name: value.default for name, value in inspect.signature(build_resnet).parameters.items()
    }
    values = {**defaults, **entry.fixed}
    return {
        "DEPTH": values["depth"],
        "NUM_GROUPS": values["num_groups"],
        "WIDTH_PER_GROUP": values["width_per_group"],
        "STEM_OUT_CHANNELS": values["stem_out_channels"],
        "RES2_OUT_CHANNELS": values["res2_out_channels"] or (256 if values["depth"] >= 50 else 64),
    }


def _problems(
    cfg: CfgNode, entry: ModelEntry, options: dict[str, Any], resnets: dict[str, Any]
) -> list[str]:
    problems = _input_problems(cfg)
    if not resnets:
        return [f"The backbone is {entry.name}; expected a ResNet or ResNeXt.", *problems]
    pool = {**entry.fixed, **options}.get("stem_pool", "pad")
    if pool != "pad":
        problems.append(f"The stem pool (MODEL.RESNETS.STEM_POOL) is {pool!r}; expected 'pad'.")
    if resnets["DEPTH"] < 50 and resnets["RES2_OUT_CHANNELS"] != 64:
        problems.append(
            f"res2 has {resnets['RES2_OUT_CHANNELS']} output channels; expected 64 for "
            f"ResNet-{resnets['DEPTH']}."
        )
    return problems


def _input_problems(cfg: CfgNode) -> list[str]:
    """Return error messages for preprocessing settings that Detectron2 does not support."""
    problems = []
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        problems.append(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; expected 'BGR' or 'RGB'.")
    if len(cfg.INPUT.VALUE_RANGE):
        problems.append(
            f"INPUT.VALUE_RANGE is {list(cfg.INPUT.VALUE_RANGE)}; expected no range, because "
            "Detectron2 reads images with 8 bits per channel."
        )
    if cfg.INPUT.EXIF == "ignore":
        problems.append(
            "INPUT.EXIF is 'ignore'; expected 'auto' or 'apply', because Detectron2 applies the "
            "EXIF orientation."
        )
    if cfg.INPUT.SIZE_DIVISIBILITY:
        problems.append(
            f"INPUT.SIZE_DIVISIBILITY is {cfg.INPUT.SIZE_DIVISIBILITY}; expected 0, because "
            "Detectron2 pads images to multiples of the FPN's largest stride."
        )
    return problems
