"""Settings for reading images, and a warning about 16-bit images that would appear black."""

import logging
from collections.abc import Callable

from detectron2.config import CfgNode

from senet_transfer.config import is_classification
from senet_transfer.data.images.decode import BrokenImageError, Reading, largest_of_16_bits
from senet_transfer.preprocessing import channels_of

logger = logging.getLogger(__name__)

# Number of 16-bit images whose pixel values are examined.
_SAMPLED = 8

# 16-bit images below this value use less than a quarter of the range.
_DIM = 1 << 14


def reading_of(cfg: CfgNode) -> Reading:
    """Return a config's settings for reading images.

    The default values are used for keys of this project that the config does not contain.
    """
    channels, exif = channels_of(cfg.INPUT.FORMAT), cfg.INPUT.get("EXIF", "auto")
    upright = exif == "apply"
    if exif == "auto":  # the defaults of Detectron2 and torchvision
        upright = not is_classification(cfg) and channels is None
    return Reading(tuple(cfg.INPUT.get("VALUE_RANGE", ())), upright, channels)


def warn_if_dark(name: str, reading: Reading, count: int, read: Callable[[int], bytes]) -> None:
    """Warn about 16-bit images that would be almost black after conversion to 8 bits.

    For example, 12-bit data that is stored in 16 bits uses only a sixteenth of the value range.

    Args:
        name: Name of the dataset.
        reading: Settings for reading the images.
        count: Number of images in the dataset. A few of them are examined.
        read: Function that returns an encoded image by its index.
    """
    if reading.value_range or reading.channels:
        return
    largest = -1
    for index in range(0, count, max(1, count // _SAMPLED))[:_SAMPLED]:
        try:
            found = largest_of_16_bits(read(index))
        except (BrokenImageError, OSError):  # reported when the image is used
            continue
        if found is None:
            return
        largest = max(largest, found)
    if not 0 <= largest < _DIM:
        return
    high = (1 << max(1, largest).bit_length()) - 1
    logger.warning(
        "%s: all pixel values of the examined 16-bit images are below %d of 65535, so the images "
        "are almost black. If they contain %d-bit data, set INPUT.VALUE_RANGE to [0, %d].",
        name, high + 1, high.bit_length(), high,
    )  # fmt: skip
