"""Optional augmentation of a classifier's training crops, using torchvision's transforms.

The transforms use PyTorch's global random generator, which
:class:`~senet_transfer.data.images.transforms.TrainTransform` seeds for each image.
"""

import functools
import math
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from senet_transfer.errors import UserError, check_choice

POLICIES = ("none", "rand_augment", "trivial_augment")

# Keys in INPUT.CLASSIFICATION that enable augmentation, in the order of application.
ENABLING_KEYS = ("VERTICAL_FLIP", "RIGHT_ANGLES", "POLICY", "COLOR_JITTER", "BLUR", "ERASING")
_DISABLED: tuple[object, ...] = (0, "none", (), [])


def build_augmentation(cfg: CfgNode) -> Callable[[Tensor], Tensor] | None:
    """Build the augmentation specified in ``INPUT.CLASSIFICATION`` for uint8 RGB crops.

    Returns:
        A transform of images `(3, S, S)`, or None if no augmentation is enabled.

    Raises:
        UserError: If a value is invalid, or augmentation is enabled for images that are kept in
            memory (``AUGMENT`` is pad_crop).
    """
    options = cfg.INPUT.CLASSIFICATION
    check_choice("INPUT.CLASSIFICATION.POLICY", options.POLICY, POLICIES)
    _check_values(options)
    enabled = [key for key in ENABLING_KEYS if options[key] not in _DISABLED]
    if enabled and options.AUGMENT != "region":
        key = enabled[0]
        raise UserError(
            f"INPUT.CLASSIFICATION.{key} is {options[key]!r}, which requires AUGMENT region, but "
            f"AUGMENT is {options.AUGMENT}. With {options.AUGMENT}, the images are kept in memory "
            f"and augmented on the device. Remove {key}. To use {key} with small images, store the "
            "images in one folder per class and set AUGMENT to region."
        )
    if not enabled:
        return None
    policies = {
        "rand_augment": lambda: v2.RandAugment(
            *options.RAND_AUGMENT, interpolation=InterpolationMode.BILINEAR
        ),
        "trivial_augment": lambda: v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
    }
    # The kernel extends to three standard deviations on each side.
    sigma = tuple(options.BLUR_SIGMA)
    blur = v2.GaussianBlur(2 * math.ceil(3 * sigma[1]) + 1, sigma)
    turns = [v2.Lambda(functools.partial(torch.rot90, k=k, dims=(-2, -1))) for k in range(4)]
    parts = {
        "VERTICAL_FLIP": lambda: v2.RandomVerticalFlip(options.VERTICAL_FLIP),
        "RIGHT_ANGLES": lambda: v2.RandomChoice(turns),
        "POLICY": lambda: policies[options.POLICY](),
        "COLOR_JITTER": lambda: v2.ColorJitter(*options.COLOR_JITTER),
        "BLUR": lambda: v2.RandomApply([blur], options.BLUR),
        "ERASING": lambda: v2.RandomErasing(options.ERASING, value=_mean_colour(cfg)),
    }
    return v2.Compose([parts[key]() for key in enabled])


def _mean_colour(cfg: CfgNode) -> list[float]:
    """Return the mean RGB colour, rounded to integers. Normalisation maps it to about 0."""
    mean = [round(value) for value in cfg.MODEL.PIXEL_MEAN]
    if cfg.INPUT.FORMAT == "L" and len(mean) == 1:
        return mean * 3
    return mean[::-1] if cfg.INPUT.FORMAT == "BGR" else mean


def _check_values(options: CfgNode) -> None:
    jitter, rand, sigma = options.COLOR_JITTER, options.RAND_AUGMENT, options.BLUR_SIGMA
    key = "INPUT.CLASSIFICATION"
    valid = not jitter or (len(jitter) == 4 and jitter[3] <= 0.5)
    if not valid or any(not 0 <= value < math.inf for value in jitter):
        raise UserError(
            f"{key}.COLOR_JITTER is {tuple(jitter)}; expected four non-negative numbers for "
            "brightness, contrast, saturation and hue (at most 0.5), or an empty list."
        )
    whole = len(rand) == 2 and all(type(value) is int for value in rand)
    if not whole or rand[0] < 1 or not 0 <= rand[1] <= 30:
        raise UserError(
            f"{key}.RAND_AUGMENT is {tuple(rand)}; expected two integers: the number of "
            "operations (at least 1), and a magnitude from 0 to 30."
        )
    if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1] <= options.CROP / 4:
        raise UserError(
            f"{key}.BLUR_SIGMA is {tuple(sigma)}; expected the minimum and the maximum standard "
            f"deviation in pixels, both positive and at most a quarter of CROP ({options.CROP})."
        )
