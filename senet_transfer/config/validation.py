"""Type and range checks for config values.

Without these checks, some invalid values would be detected late or not at all.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from detectron2.config import CfgNode

from senet_transfer.config.defaults import config_items, config_value, get_senet_config
from senet_transfer.errors import UserError, check_choice
from senet_transfer.preprocessing import channels_of
from senet_transfer.utils.text import counted

logger = logging.getLogger(__name__)

# Minimum and maximum, both inclusive. Some of the values are used as divisors in Detectron2.
RANGES = {
    "DATALOADER.MAX_SKIP_RATIO": (0, 1),
    "DATALOADER.NUM_WORKERS": (0, 256),
    "DATALOADER.SHUFFLE_BLOCK": (1, math.inf),
    "INPUT.CLASSIFICATION.BLUR": (0, 1),
    "INPUT.CLASSIFICATION.CROP": (1, math.inf),
    "INPUT.CLASSIFICATION.ERASING": (0, 1),
    "INPUT.CLASSIFICATION.FLIP": (0, 1),
    "INPUT.CLASSIFICATION.TEST_CROP": (1, math.inf),
    "INPUT.CLASSIFICATION.TEST_RESIZE": (1, math.inf),
    "INPUT.CLASSIFICATION.VERTICAL_FLIP": (0, 1),
    "INPUT.COPY_PASTE": (0, 1),
    "INPUT.MAX_SIZE_TEST": (1, math.inf),
    "INPUT.MAX_SIZE_TRAIN": (1, math.inf),
    "INPUT.MIN_SIZE_TEST": (0, math.inf),
    "INPUT.SIZE_DIVISIBILITY": (0, math.inf),
    "INPUT.VERTICAL_FLIP": (0, 1),
    "MODEL.BACKBONE.FREEZE_AT": (0, 6),
    "MODEL.CLASSIFIER.CUTMIX": (0, math.inf),
    "MODEL.CLASSIFIER.DROPOUT": (0, 1),
    "MODEL.CLASSIFIER.FOCAL_GAMMA": (0, math.inf),
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": (0, 1),
    "MODEL.CLASSIFIER.MIXUP": (0, math.inf),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": (1, math.inf),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": (0, 1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": (0, 1),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": (0, 1),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": (1, math.inf),
    "MODEL.RPN.NMS_THRESH": (0, 1),
    "MODEL.RPN.POSITIVE_FRACTION": (0, 1),
    "SOLVER.BACKBONE_MULTIPLIER": (0, math.inf),
    "SOLVER.BASE_LR": (0, math.inf),
    "SOLVER.BASE_LR_END": (0, math.inf),
    "SOLVER.BIAS_LR_FACTOR": (0, math.inf),
    "SOLVER.CHECKPOINTS_KEPT": (0, math.inf),
    "SOLVER.CHECKPOINT_PERIOD": (1, math.inf),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (0, math.inf),
    "SOLVER.EMA.DECAY": (0, 1),
    "SOLVER.FROZEN_BN_ITERS": (0, math.inf),
    "SOLVER.GAMMA": (0, math.inf),
    "SOLVER.IMS_PER_BATCH": (1, math.inf),
    "SOLVER.LAYER_DECAY": (0, 1),
    "SOLVER.MAX_ITER": (1, math.inf),
    "SOLVER.MAX_NONFINITE_STEPS": (0, math.inf),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.WARMUP_FACTOR": (0, 1),
    "SOLVER.WARMUP_ITERS": (0, math.inf),
    "SOLVER.WEIGHT_DECAY": (0, math.inf),
    "SOLVER.WEIGHT_DECAY_BIAS": (0, math.inf),
    "SOLVER.WEIGHT_DECAY_NORM": (0, math.inf),
    "TEST.DETECTIONS_PER_IMAGE": (1, math.inf),
    "TEST.EVAL_PERIOD": (0, math.inf),
    "TEST.PATIENCE": (0, math.inf),
}


# IoU types for a detector's diagnostics: boxes and masks.
IOU_TYPES = ("bbox", "segm")


# Example elements for lists with an empty default, from which the type can't be inferred.
_ELEMENTS: dict[str, Any] = {
    "DATASETS.CATEGORY_IDS": 1,
    "DATASETS.CLASSES": "name",
    "DATASETS.KEYPOINTS": "name",
    "DATASETS.PROPOSAL_FILES_TEST": "path",
    "DATASETS.PROPOSAL_FILES_TRAIN": "path",
    "DATASETS.REGISTER": "path",
    "DATASETS.STUFF_CLASSES": "name",
    "INPUT.BRIGHTNESS": 0.0,
    "INPUT.CLASSIFICATION.COLOR_JITTER": 0.0,
    "INPUT.CONTRAST": 0.0,
    "INPUT.SATURATION": 0.0,
    "INPUT.VALUE_RANGE": 0.0,
    "MODEL.FPN.IN_FEATURES": "res2",
    "SOLVER.STEP_EPOCHS": 1,
    "SOLVER.UNFREEZE_EPOCHS": 1,
    "SOLVER.UNFREEZE_ITERS": 1,
    "TEST.KEYPOINT_OKS_SIGMAS": 0.1,
}


_KINDS = {bool: "True or False", int: "numbers", float: "numbers", str: "strings"}


def check_elements(cfg: CfgNode) -> None:
    """Raise a UserError if a list contains elements of a different type than the default list.

    yacs checks that a value is a list, but does not check its elements. If the default is a list of
    lists, such as Detectron2's anchor sizes, lists of any depth are accepted.
    """
    values = dict(config_items(cfg))
    for key, default in config_items(get_senet_config()):
        value = values.get(key)
        if not (isinstance(default, list | tuple) and isinstance(value, list | tuple)):
            continue
        nested = key == "DATASETS.REGISTER" or any(isinstance(e, list | tuple) for e in default)
        example = next(_leaves(default), _ELEMENTS.get(key))
        elements = _leaves(value) if nested else value
        wrong = [element for element in elements if not _is_like(element, example)]
        if example is not None and wrong:
            kind = _KINDS[type(example)]
            raise UserError(
                f"{key} is {value!r}; expected only {kind} as list elements, found {wrong[0]!r}. "
                "Correct the list."
            )


def _leaves(value: list | tuple) -> Iterator[Any]:
    for element in value:
        if isinstance(element, list | tuple):
            yield from _leaves(element)
        else:
            yield element


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, bool) or isinstance(value, bool):
        return type(value) is type(example)
    if isinstance(example, int | float):
        return isinstance(value, int | float)
    return isinstance(value, type(example))


# Lists whose first element is used by Detectron2.
_NOT_EMPTY = (
    "MODEL.RETINANET.IOU_THRESHOLDS",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS",
    "MODEL.RPN.IOU_THRESHOLDS",
)


def check_ranges(cfg: CfgNode) -> None:
    """Check that numbers are finite and within their range, and that required lists are not empty.

    Raises:
        UserError: If a value is invalid. The message includes the key, the value and the valid
            range.
    """
    values = dict(config_items(cfg))
    for key, (least, most) in RANGES.items():
        value = values[key]
        # None is a valid value for keys whose default is None.
        if value is None:
            continue
        if not isinstance(value, int | float) or not (least <= value <= most and value < math.inf):
            limits = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            raise UserError(f"{key} is {value!r}; expected {limits}.")
    for key in _NOT_EMPTY:
        if not values[key]:
            raise UserError(f"{key} is {values[key]!r}; expected at least one number.")
    if unknown := set(cfg.TEST.DIAGNOSTICS) - set(IOU_TYPES):
        raise UserError(
            f"TEST.DIAGNOSTICS (--iou-types) contains {sorted(unknown)[0]!r}; expected "
            f"{' or '.join(map(repr, IOU_TYPES))}."
        )
    if cfg.SOLVER.CHECKPOINTS_KEPT == 1:
        raise UserError(
            "SOLVER.CHECKPOINTS_KEPT is 1; expected 0 (keep all) or at least 2. If the only "
            "checkpoint were corrupted, there would be no earlier checkpoint to resume from."
        )


IMAGE_FORMATS = ("BGR", "RGB", "L")
MOST_CHANNELS = 16


def check_encoding(items: Iterable[tuple[str, Any]]) -> None:
    """Check that the values of config keys can be saved in ``config.yaml``.

    Raises:
        UserError: If a value contains a path that is not valid UTF-8.
    """
    for key, value in items:
        text = json.dumps(value, ensure_ascii=False, default=str)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{key} is {ascii(value)}, which is not valid UTF-8 and can't be saved in "
                "config.yaml. Rename the file or folder, or specify a symbolic link to it."
            ) from None


def check_input(cfg: CfgNode) -> None:
    """Check the keys that describe the model's input images.

    Raises:
        UserError: If the image format is not supported, or the mean, std or value range is invalid.
    """
    image_format = cfg.INPUT.FORMAT
    count = channels_of(image_format)
    if image_format not in IMAGE_FORMATS and count != (cfg.INPUT.CHANNELS or 0):
        raise UserError(
            f"INPUT.FORMAT is {image_format!r}; expected one of: {', '.join(IMAGE_FORMATS)}. Other "
            "formats, such as Detectron2's YUV-BT.601, are not supported. For multispectral "
            "images, set INPUT.CHANNELS instead."
        )
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    channels = (1, 3) if image_format == "L" else (count or 3,)
    if len(mean) not in channels or len(std) != len(mean):
        expected = (
            "1 value each, or 3 for a network with 3 input channels,"
            if image_format == "L"
            else f"{count or 3} values each"
        )
        raise UserError(
            f"MODEL.PIXEL_MEAN has {counted(len(mean), 'value')} and MODEL.PIXEL_STD has "
            f"{len(std)}; expected {expected} for INPUT.FORMAT {image_format}."
        )
    if not all(math.isfinite(value) for value in (*mean, *std)) or 0 in std:
        raise UserError(
            f"MODEL.PIXEL_MEAN is {list(mean)} and MODEL.PIXEL_STD is {list(std)}; expected finite "
            "means and finite, non-zero standard deviations."
        )
    _check_channels(cfg, count)
    check_choice("INPUT.EXIF", cfg.INPUT.EXIF, ("auto", "apply", "ignore"))
    limits = cfg.INPUT.VALUE_RANGE
    if len(limits) not in (0, 2) or not all(map(math.isfinite, limits)):
        raise UserError(
            f"INPUT.VALUE_RANGE is {list(limits)}; expected [low, high] (the pixel values "
            "of black and white) or an empty list."
        )
    if limits and limits[0] >= limits[1]:
        raise UserError(
            f"INPUT.VALUE_RANGE is {list(limits)}; expected the lower value first: [low, high]."
        )


# Supported values of keys if INPUT.CHANNELS is set. Other values require colour images.
_SUPPORTED_WITH_CHANNELS: dict[str, tuple[object, ...]] = {
    "INPUT.CLASSIFICATION.AUGMENT": ("region",),
    "INPUT.CLASSIFICATION.COLOR_JITTER": ((), []),
    "INPUT.CLASSIFICATION.POLICY": ("none",),
    "INPUT.LARGE_SCALE_JITTER.ENABLED": (False,),
    "INPUT.SATURATION": ((), []),
    "TEST.AUG.ENABLED": (False,),
    "VIS_PERIOD": (0,),
}


def _check_channels(cfg: CfgNode, count: int | None) -> None:
    """Raise a UserError for settings that are not supported together with ``INPUT.CHANNELS``."""
    for key, supported in _SUPPORTED_WITH_CHANNELS.items():
        value = config_value(cfg, key)
        if count is not None and value not in supported:
            raise UserError(
                f"{key} is {value!r}, which is not supported with INPUT.CHANNELS {count}. Set it "
                f"to {supported[0]!r}."
            )


@contextlib.contextmanager
def config_errors(what: str) -> Iterator[None]:
    """Convert errors that Detectron2 or torch raises while building an object to a UserError.

    Errors that indicate bugs, such as AttributeError and TypeError, are not converted. The
    traceback of a converted error is written to the log.

    Args:
        what: The name of the object to build, for the error message.
    """
    try:
        yield
    except (AssertionError, KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        logger.info("Building %s failed:", what, exc_info=True)
        raise UserError(
            f"The {what} can't be built from this config: {type(error).__name__}: {error}. "
            "Compare the keys that you changed with Detectron2's config reference and "
            "senet_transfer/config/defaults.py. The traceback is in log.txt."
        ) from error
