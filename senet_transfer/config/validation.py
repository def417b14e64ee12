"""The values that numbers and names of a config can have, where a wrong one shows late or never."""

import contextlib
import logging
import math
from collections.abc import Iterator

from detectron2.config import CfgNode

from senet_transfer.config.defaults import config_items
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


def check_ranges(cfg: CfgNode) -> None:
    """Refuses numbers out of range, and those that are infinite or none.

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
    if cfg.SOLVER.CHECKPOINTS_KEPT == 1:
        raise UserError(
            "SOLVER.CHECKPOINTS_KEPT is 1, and there would be none before one that is damaged. "
            "Set it to 2 or more, or to 0 to keep all."
        )


@contextlib.contextmanager
def config_errors(what: str) -> Iterator[None]:
    """Says of what fails within that the config asks for it; the log has where.

    Detectron2 builds what a config describes without looking at it first.
    """
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        logger.info("Building %s failed:", what, exc_info=True)
        raise UserError(
            f"The config describes no {what} that can be built: {type(error).__name__}: {error}. "
            "Compare the keys that differ from the recipe with Detectron2's config reference and "
            "senet_transfer/config/defaults.py; log.txt has where it failed."
        ) from error
