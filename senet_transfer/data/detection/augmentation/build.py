"""Training augmentation for detectors, built from Detectron2's transforms."""

import math
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from senet_transfer.config.architectures import PIXELS, predicts, predicts_rotated_boxes
from senet_transfer.data.detection.augmentation.right_angles import RandomRightAngles
from senet_transfer.errors import UserError, check_choice

_CROPS = ("relative_range", "relative", "absolute", "absolute_range")
_COLOURS = ("BRIGHTNESS", "CONTRAST", "SATURATION")


class RandomSaturation(T.RandomSaturation):
    """Variant of Detectron2's `RandomSaturation` that supports both RGB and BGR images."""

    def __init__(self, intensity_min: float, intensity_max: float, image_format: str):
        super().__init__(intensity_min, intensity_max)
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Sample a saturation factor, and return the transform."""
        return super().get_transform(image[..., ::-1] if self.image_format == "BGR" else image)


def with_augmentation(cfg: CfgNode, augmentations: list[T.Augmentation]) -> list[T.Augmentation]:
    """Add the augmentation specified in the config to Detectron2's training augmentation.

    Args:
        cfg: Config of the run. For a Detectron2 config without this project's keys,
            `augmentations` is returned unchanged.
        augmentations: Detectron2's augmentation for this config: an optional random crop, a resize
            and an optional flip.

    Returns:
        The augmentations in the order in which they are applied.
    """
    options = cfg.INPUT
    if "RIGHT_ANGLES" not in options:
        return augmentations
    changed: list[T.Augmentation] = []
    for augmentation in augmentations:
        if not isinstance(augmentation, T.ResizeShortestEdge):
            changed.append(augmentation)
            continue
        # Colours are changed first, because most images are smaller before the resize.
        changed += _colours(options)
        jitter = options.LARGE_SCALE_JITTER
        if jitter.ENABLED:
            changed.append(T.ResizeScale(*jitter.SCALE, *jitter.SIZE))
            changed.append(T.FixedSizeCrop(tuple(jitter.SIZE), pad=False))
        else:
            changed.append(augmentation)
    if options.VERTICAL_FLIP:
        changed.append(T.RandomFlip(options.VERTICAL_FLIP, horizontal=False, vertical=True))
    if options.RIGHT_ANGLES:
        changed.append(RandomRightAngles())
    return changed


def _colours(options: CfgNode) -> list[T.Augmentation]:
    found: list[T.Augmentation] = []
    if options.BRIGHTNESS:
        found.append(T.RandomBrightness(*options.BRIGHTNESS))
    if options.CONTRAST:
        found.append(T.RandomContrast(*options.CONTRAST))
    if options.SATURATION:
        low, high = options.SATURATION
        found.append(RandomSaturation(low, high, options.FORMAT))
    return found


def crops_images(cfg: CfgNode) -> bool:
    """Return True if the training augmentation crops images.

    For a model with a mask head, boxes must then be recomputed from the cropped masks.
    """
    jitter = cfg.INPUT.get("LARGE_SCALE_JITTER")
    return cfg.INPUT.CROP.ENABLED or bool(jitter and jitter.ENABLED)


def check_detection_augmentation(cfg: CfgNode) -> None:
    """Check the config keys for a detector's training augmentation.

    Raises:
        UserError: If a value is invalid, or the model does not support the augmentation.
    """
    options = cfg.INPUT
    check_choice("INPUT.RANDOM_FLIP", options.RANDOM_FLIP, ("horizontal", "vertical", "none"))
    check_choice("INPUT.CROP.TYPE", options.CROP.TYPE, _CROPS)
    for key in _COLOURS:
        if options[key]:
            _check_factors(f"INPUT.{key}", options[key], ", or an empty list")
    if options.SATURATION and options.FORMAT == "L":
        raise UserError(
            f"INPUT.SATURATION is {tuple(options.SATURATION)}, but INPUT.FORMAT is L, and "
            "grayscale images have no saturation. Remove INPUT.SATURATION."
        )
    jitter = options.LARGE_SCALE_JITTER
    _check_factors("INPUT.LARGE_SCALE_JITTER.SCALE", jitter.SCALE)
    size = jitter.SIZE
    if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise UserError(
            f"INPUT.LARGE_SCALE_JITTER.SIZE is {tuple(size)}; expected two positive integers, the "
            "height and width in pixels, such as (1024, 1024)."
        )
    _check_crop(options.CROP)
    if crops_images(cfg) and predicts_rotated_boxes(cfg):
        key = "CROP" if options.CROP.ENABLED else "LARGE_SCALE_JITTER"
        raise UserError(
            f"INPUT.{key}.ENABLED is True, but Detectron2 can't crop rotated boxes. Set "
            f"INPUT.{key}.ENABLED to False."
        )
    _check_copy_paste(cfg)


def _check_factors(key: str, value: Sequence[float], or_empty: str = "") -> None:
    # A factor of 0 would result in a black, grey or empty image.
    if len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise UserError(
            f"{key} is {tuple(value)}; expected two positive numbers, the minimum and the "
            f"maximum factor{or_empty}."
        )


def _check_crop(crop: CfgNode) -> None:
    size = crop.SIZE
    relative = crop.TYPE.startswith("relative")
    whole = relative or all(type(side) is int for side in size)
    if len(size) != 2 or not whole or min(size) <= 0 or (relative and max(size) > 1):
        expected = "fractions from 0 to 1" if relative else "whole numbers of pixels"
        raise UserError(
            f"INPUT.CROP.SIZE is {tuple(size)}; expected two {expected} for INPUT.CROP.TYPE "
            f"{crop.TYPE}."
        )


def _check_copy_paste(cfg: CfgNode) -> None:
    if not cfg.INPUT.COPY_PASTE:
        return
    others = {
        "MODEL.KEYPOINT_ON is True": cfg.MODEL.KEYPOINT_ON,
        "MODEL.LOAD_PROPOSALS is True": cfg.MODEL.LOAD_PROPOSALS,
        f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}": PIXELS in predicts(cfg),
        "the model predicts rotated boxes": predicts_rotated_boxes(cfg),
        "MODEL.MASK_ON is False": not cfg.MODEL.MASK_ON,
    }
    for problem, present in others.items():
        if present:
            raise UserError(
                f"INPUT.COPY_PASTE is {cfg.INPUT.COPY_PASTE:g}, but {problem}. Copy-paste requires "
                "a model with a mask head, and does not support keypoints, precomputed proposals, "
                "semantic segmentation or rotated boxes. Set INPUT.COPY_PASTE to 0."
            )
