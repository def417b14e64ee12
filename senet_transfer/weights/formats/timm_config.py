"""Information about a network in the ``config.json`` that timm writes next to a weight file."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.text import shown

# Names of weight files in a Hugging Face Hub repository, in order of preference.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_DESCRIBED = (*WEIGHT_FILES, *(f"{name}.index.json" for name in WEIGHT_FILES))

# Arguments of timm's models whose values can be inferred from the tensors.
_DETERMINED = {"num_classes", "in_chans", "pretrained", "drop_rate", "drop_path_rate"}

# Options of timm's train.py, all of which are in its checkpoints, possibly with the value None.
_TRAIN_OPTIONS = {"mean", "std", "interpolation", "crop_pct"}

# Limits for the options of train.py, beyond which they are ignored.
_MAX_SIDE = 2**16
_MIN_CROP_PCT = 0.1


@dataclass(frozen=True)
class TimmConfig:
    """Content of timm's ``config.json``.

    Attributes:
        architecture: Name of the timm model, such as "resnet18".
        preprocessing: Preprocessing at test time.
        classes: Class names in the order of the model's outputs; empty if they are not specified.
    """

    architecture: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()


def read_timm_config(weights: Path) -> TimmConfig | None:
    """Read the ``config.json`` that timm has stored next to a weight file.

    Returns:
        The config, or None if there is no such file or if it was not written by timm.

    Raises:
        UserError: If the file is damaged, or describes a network or preprocessing that is not
            supported.
    """
    path = weights.with_name("config.json")
    if weights.name not in _DESCRIBED or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, which describes {weights.name}, can't be read: {shown(error)}. Download it "
            "again."
        ) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("architecture"), str):
        return None
    # Files written before timm 0.9 contain the values of pretrained_cfg at the top level.
    stated = content.get("pretrained_cfg") or content
    try:
        model_args = dict(content.get("model_args") or {})
        if model_args.pop("global_pool", "avg") not in ("", "avg"):
            raise ValueError("global_pool is not avg")
        if unknown := sorted(set(model_args) - _DETERMINED):
            raise ValueError(f"model_args contains {', '.join(map(shown, unknown))}")
        names = content.get("label_names") or stated.get("label_names") or ()
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise ValueError("label_names is not a list of strings")
        return TimmConfig(content["architecture"], _preprocessing(stated), tuple(names))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}, which describes {weights.name}, is not supported: {shown(error)}. Expected "
            "input_size, mean, std, crop_pct and interpolation (bilinear or bicubic) in timm's "
            "format, no crop_mode other than center, and no model_args that change the network. "
            "Remove this file to load the weights without the information in it."
        ) from error


def train_options(metadata: Mapping[str, Any], default: Preprocessing) -> dict[str, Any] | None:
    """Return the preprocessing fields that a checkpoint of timm's ``train.py`` specifies.

    The result is None for other checkpoints. Options with invalid values are ignored.

    Args:
        metadata: Metadata of the checkpoint. ``train.py`` saves its options under the key ``args``.
        default: Preprocessing of the network, used for options without a valid value.
    """
    args = metadata.get("args")
    if not isinstance(args, Mapping) or not args.keys() >= _TRAIN_OPTIONS:
        return None
    found: dict[str, Any] = {}
    for key, low in (("mean", -math.inf), ("std", 0.0)):
        if values := _channel_values(args[key], low):
            found[key] = values
    if args["interpolation"] in ("bilinear", "bicubic"):
        found["interpolation"] = args["interpolation"]
    size = args.get("input_size") or [args.get("img_size")]
    crop = size[-1] if isinstance(size, list | tuple) else None
    if type(crop) is not int or not 0 < crop <= _MAX_SIDE:
        crop = default.crop
    crop_pct, stated = default.crop / default.resize, args["crop_pct"]
    if not _is_number(stated, 0) or not _MIN_CROP_PCT <= stated <= 1:
        stated = crop_pct
    if (crop, stated) != (default.crop, crop_pct):
        found |= {"resize": math.floor(crop / stated), "crop": crop}
    return found


def _channel_values(values: Any, low: float) -> tuple[float, ...]:
    """Scale a mean or std to pixel values from 0 to 255, and return one value per channel.

    Return an empty tuple if the values are invalid.
    """
    if not isinstance(values, list | tuple) or len(values) not in (1, 3):
        return ()
    if not all(_is_number(value, low) for value in values):
        return ()
    return tuple(round(255 * value, 4) for value in values) * (3 // len(values))


def _is_number(value: Any, low: float) -> bool:
    return type(value) in (float, int) and low < value < math.inf


def _preprocessing(stated: Mapping[str, Any]) -> Preprocessing:
    """Convert the preprocessing in timm's config to this project's settings.

    As in timm, the shorter side is resized to ``crop / crop_pct``.
    """
    channels, height, width = stated["input_size"]
    mean, std = (
        tuple(round(255 * float(value), 4) for value in stated[key]) for key in ("mean", "std")
    )
    interpolation, mode = stated["interpolation"], stated.get("crop_mode") or "center"
    if interpolation not in ("bilinear", "bicubic") or mode != "center" or height != width:
        raise ValueError(
            f"its preprocessing has input_size {height}x{width}, interpolation {interpolation} and "
            f"crop_mode {mode}"
        )
    if channels not in (1, 3) or {len(mean), len(std)} != {channels}:
        raise ValueError(
            f"it has {channels} input channels, {len(mean)} means and {len(std)} stds; expected 1 "
            "of each or 3 of each"
        )
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"the values of mean ({mean}) or std ({std}) are invalid")
    resize = math.floor(height / float(stated["crop_pct"]))
    if not 0 < height <= resize:
        raise ValueError(
            f"input_size is {height} (expected > 0) and crop_pct is {stated['crop_pct']} (expected "
            "> 0, <= 1)"
        )
    return Preprocessing(
        format="RGB" if channels == 3 else "L",
        mean=mean,
        std=std,
        resize=resize,
        crop=height,
        interpolation=interpolation,
    )
