"""Config settings for reading images."""

from detectron2.config import CfgNode

from senet_transfer.config import is_classification
from senet_transfer.data.images.decode import Reading
from senet_transfer.preprocessing import channels_of


def reading_of(cfg: CfgNode) -> Reading:
    """Return the image reading settings in a config, which may lack this project's keys."""
    channels, exif = channels_of(cfg.INPUT.FORMAT), cfg.INPUT.get("EXIF", "auto")
    upright = exif == "apply"
    if exif == "auto":  # the defaults of Detectron2 and torchvision
        upright = not is_classification(cfg) and channels is None
    return Reading(tuple(cfg.INPUT.get("VALUE_RANGE", ())), upright, channels)
