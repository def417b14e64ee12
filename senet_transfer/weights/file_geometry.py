"""Transfer of layer options and preprocessing from a weight file to a config."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from senet_transfer.config import config_value
from senet_transfer.errors import UserError
from senet_transfer.preprocessing import channels_of, same_pixels
from senet_transfer.weights.choice import Choice, config_choice, kept_keys
from senet_transfer.weights.formats.sniff import sniff
from senet_transfer.weights.hub.catalogue import locate_weights, nearest_names
from senet_transfer.weights.mapping.source import Source, examine

logger = logging.getLogger(__name__)

# Config keys for the options returned by Source.options().
OPTION_KEYS = {
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "stem_pool": "MODEL.RESNETS.STEM_POOL",
    "se_relu_before": "MODEL.SE.RELU_BEFORE",
    "se_bias": "MODEL.SE.BIAS",
    "se_stages": "MODEL.SE.STAGES",
    "se_ratio": "MODEL.SE.RATIO",
    "se_divisor": "MODEL.SE.DIVISOR",
}


@dataclass(frozen=True)
class Change:
    """Change of a config key to the value from a weight file."""

    key: str
    before: Any
    after: Any


def local_weights(name: str, family: str | None = None) -> tuple[str, str | None]:
    """Return the local path and the weight family of a weight file.

    Args:
        name: Path, catalogue name or URL, as in ``MODEL.WEIGHTS``. For a catalogue name or a URL,
            the file is downloaded to a cache.
        family: Weight family specified by the user, such as "timm". If None, the family listed
            in the catalogue is used, if there is one.

    Raises:
        UserError: If the file does not exist or can't be downloaded.
    """
    place, family = locate_weights(name, family)
    try:
        path = PathManager.get_local_path(str(place))
    except Exception as error:  # URL handlers raise exceptions of various types
        raise UserError(f"Cannot download the weights {name}: {error}. Check the URL.") from error
    if os.path.isdir(path):
        sniff(Path(path))  # raise an error that describes the folder
    if not os.path.isfile(path):
        near = nearest_names(name)
        hint = f" Similar names in the catalogue: {', '.join(near)}." if near else ""
        raise UserError(
            f"The weight file {name} ({os.path.abspath(path)}) does not exist. Set MODEL.WEIGHTS "
            f"to the path of an existing file.{hint}"
        )
    return path, family


def examine_config_weights(cfg: CfgNode, weights: str | None = None) -> Source | None:
    """Read the weight file specified in a config, and detect its weight family and architecture.

    Args:
        cfg: Config with ``MODEL.WEIGHTS`` and the keys that describe the weight file.
        weights: File to use instead of ``MODEL.WEIGHTS``, such as the checkpoint of a resumed run.

    Returns:
        The result of :func:`examine`, or None if no weight file is specified.

    Raises:
        UserError: If the file can't be read, or its weight family is unknown.
    """
    # MODEL.WEIGHTS_FAMILY and similar keys apply only to MODEL.WEIGHTS. A checkpoint specifies its
    # own family.
    is_other = weights is not None and weights != cfg.MODEL.WEIGHTS
    family = None if is_other else cfg.MODEL.WEIGHTS_FAMILY or None
    name = cfg.MODEL.WEIGHTS if weights is None else weights
    if not name:
        return None
    path, family = local_weights(name, family)
    return examine(path, family, **(Choice() if is_other else config_choice(cfg)))


def apply_file_geometry(cfg: CfgNode, weights: str | Source | None = None) -> list[Change]:
    """Set config keys to the layer options and preprocessing of the network in a weight file.

    Call this function before building the model. The keys describe the stride placement, the stem
    pool, the channel order, the mean and std, and the SE layers (biases, rounding of the hidden
    widths, ReLU before the gate). Changes are logged as a table. Keys that the user has set
    (``MODEL.WEIGHTS_KEEP``), or all keys if ``MODEL.WEIGHTS_PIN`` is True, are never changed.

    Args:
        cfg: Config, which is changed in place even if it is frozen.
        weights: File to use instead of ``MODEL.WEIGHTS``, such as the last checkpoint of a resumed
            run. Either a name or the result of :func:`examine`. If empty, nothing is changed.

    Returns:
        The changes made to the config.

    Raises:
        UserError: If the file can't be read, its weight family is unknown, or its values contradict
            config keys that must not be changed.
    """
    source = weights if isinstance(weights, Source) else examine_config_weights(cfg, weights)
    changes = _changes(cfg, source) if source else []
    if not source or not changes:
        return []
    table = tabulate(
        [(c.key, c.before, c.after) for c in changes],
        headers=("key", "in the config", "in the file"),
    )
    if cfg.MODEL.WEIGHTS_PIN:
        raise UserError(
            f"MODEL.WEIGHTS_PIN is True, but {source.path}, detected as {source.detected_as}, was "
            f"trained with values that differ from the config:\n{table}\nSet these keys to the "
            "file's values, or set MODEL.WEIGHTS_PIN to False."
        )
    if kept := [change for change in changes if change.key in kept_keys(cfg)]:
        lines = "\n".join(f"  {c.key}: {c.before}, but {c.after} in the file" for c in kept)
        raise UserError(
            f"Your config sets values that contradict {source.path}, detected as "
            f"{source.detected_as}, which was trained with different values:\n{lines}\nRemove "
            "these keys from your config and the command line, or use different weights."
        )
    frozen = cfg.is_frozen()
    cfg.defrost()
    for change in changes:
        node, _, leaf = change.key.rpartition(".")
        config_value(cfg, node)[leaf] = change.after
    if frozen:
        cfg.freeze()
    logger.info("Config keys set from %s (%s):\n%s", source.path, source.detected_as, table)
    return changes


def _changes(cfg: CfgNode, source: Source) -> list[Change]:
    wanted = [(key, config_value(cfg, key), value) for key, value in _wanted(cfg, source).items()]
    return [Change(key, own, value) for key, own, value in wanted if not _equal(own, value)]


def _wanted(cfg: CfgNode, source: Source) -> dict[str, Any]:
    """Return the config keys that a weight file determines, and their values."""
    wanted = {OPTION_KEYS[name]: value for name, value in source.geometry.options().items()}
    if source.preprocessing:
        pixels, channels = source.preprocessing, channels_of(source.preprocessing.format)
        # When weights for colour images are loaded, they are adapted to the channels in the config.
        if channels or not channels_of(cfg.INPUT.FORMAT):
            # Networks for colour images receive grayscale images as three equal channels.
            grey = cfg.INPUT.FORMAT == "L" and not channels
            wanted["INPUT.FORMAT"] = "L" if grey else pixels.format
            wanted["MODEL.PIXEL_MEAN"] = list(pixels.mean)
            wanted["MODEL.PIXEL_STD"] = list(pixels.std)
        if channels:
            wanted["INPUT.CHANNELS"] = channels
    arch = source.architecture
    if arch and arch.se_stages and arch.se_ratio == cfg.MODEL.SE.RATIO:
        wanted["MODEL.SE.DIVISOR"] = arch.se_divisor
        # SE biases are never enabled here. If the file has biases but the config does not, loading
        # raises an error.
        if not arch.se_bias:
            wanted["MODEL.SE.BIAS"] = False
    return wanted


def _equal(first: Any, second: Any) -> bool:
    if isinstance(second, list):
        return same_pixels(first, second)
    return first == second
