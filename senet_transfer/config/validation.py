"""Types and ranges of config values, where an invalid one is noticed late or never."""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

from senet_transfer.config.defaults import config_items, get_senet_config
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)

# The least and the largest value, both allowed. Detectron2 divides by some of these.
RANGES = {
    "DATALOADER.MAX_SKIP_RATIO": (0, 1),
    "DATALOADER.NUM_WORKERS": (0, 256),
    "DATALOADER.SHUFFLE_BLOCK": (1, math.inf),
    "INPUT.CLASSIFICATION.CROP": (1, math.inf),
    "INPUT.CLASSIFICATION.FLIP": (0, 1),
    "INPUT.CLASSIFICATION.TEST_CROP": (1, math.inf),
    "INPUT.CLASSIFICATION.TEST_RESIZE": (1, math.inf),
    "INPUT.MAX_SIZE_TEST": (1, math.inf),
    "INPUT.MAX_SIZE_TRAIN": (1, math.inf),
    "INPUT.MIN_SIZE_TEST": (0, math.inf),
    "MODEL.BACKBONE.FREEZE_AT": (0, 6),
    "MODEL.CLASSIFIER.CUTMIX": (0, math.inf),
    "MODEL.CLASSIFIER.DROPOUT": (0, 1),
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
}


# What is in lists whose default is empty, which shows nothing about it.
_ELEMENTS: dict[str, Any] = {
    "DATASETS.CATEGORY_IDS": 1,
    "DATASETS.CLASSES": "name",
    "DATASETS.PROPOSAL_FILES_TEST": "path",
    "DATASETS.PROPOSAL_FILES_TRAIN": "path",
    "DATASETS.REGISTER": "path",
    "MODEL.FPN.IN_FEATURES": "res2",
    "SOLVER.STEP_EPOCHS": 1,
    "TEST.KEYPOINT_OKS_SIGMAS": 0.1,
}


_KINDS = {bool: "True or False", int: "a number", float: "a number", str: "text"}


def check_elements(cfg: CfgNode) -> None:
    """Raise UserError for a list of a config whose elements have another type than the default's.

    yacs compares the types of lists, not those of their elements. Where the default is a list of
    lists, as Detectron2's anchors are, a list of any depth is accepted.
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
            raise UserError(f"{key} is {value!r}: expected {kind}, found {wrong[0]!r}.")


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


# Lists that Detectron2 takes the first element of.
_NOT_EMPTY = (
    "MODEL.RETINANET.IOU_THRESHOLDS",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS",
    "MODEL.RPN.IOU_THRESHOLDS",
)


def check_ranges(cfg: CfgNode) -> None:
    """Raise UserError for numbers out of range or not finite, and for lists that may not be empty.

    Raises:
        UserError: names the key, its value and its range.
    """
    values = dict(config_items(cfg))
    for key, (least, most) in RANGES.items():
        value = values[key]
        # None is a choice of its own where it is allowed.
        if value is None:
            continue
        if not isinstance(value, int | float) or not (least <= value <= most and value < math.inf):
            limits = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            raise UserError(f"{key} is {value!r}, expected {limits}.")
    for key in _NOT_EMPTY:
        if not values[key]:
            raise UserError(f"{key} is {values[key]!r}, expected at least one number.")
    if cfg.SOLVER.CHECKPOINTS_KEPT == 1:
        raise UserError(
            "SOLVER.CHECKPOINTS_KEPT is 1, and there would be none before one that is damaged. "
            "Set it to 2 or more, or to 0 to keep all."
        )


@contextlib.contextmanager
def config_errors(what: str) -> Iterator[None]:
    """Raise UserError for what the builders of Detectron2 and torch raise for invalid values.

    Programming errors, such as an AttributeError or a TypeError, are not caught. The log has the
    traceback of what is.

    Args:
        what: the name of what is built, for the message.
    """
    try:
        yield
    except (AssertionError, KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        logger.info("Building %s failed:", what, exc_info=True)
        raise UserError(
            f"The config describes no {what} that can be built: {type(error).__name__}: {error}. "
            "Compare the keys that differ from the recipe with Detectron2's config reference and "
            "senet_transfer/config/defaults.py; log.txt has where it failed."
        ) from error
