"""Transfer of a weight file's geometry and preprocessing to a config."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from senet_transfer.config import config_value
from senet_transfer.errors import UserError
from senet_transfer.weights.hub.catalogue import locate_weights, nearest_names
from senet_transfer.weights.load import same_pixels
from senet_transfer.weights.mapping.source import Source, examine

logger = logging.getLogger(__name__)

# Config keys of the options that Source.options() returns.
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
    """Change of a config key to the value of a weight file."""

    key: str
    before: Any
    after: Any


def local_weights(name: str, family: str | None = None) -> tuple[str, str | None]:
    """Return the local path of the file that ``MODEL.WEIGHTS`` names, and its family.

    Args:
        name: A path, a name in the catalogue or a URL. The latter two are downloaded to a cache.
        family: The family given by the user. None uses the catalogue's, or leaves it undetermined.

    Raises:
        UserError: The file does not exist or can't be downloaded.
    """
    place, family = locate_weights(name, family)
    try:
        path = PathManager.get_local_path(str(place))
    except Exception as error:  # the handlers of URL schemes raise various types
        raise UserError(
            f"The weights {name} can't be downloaded: {error}. Check the address."
        ) from error
    if not os.path.isfile(path):
        near = nearest_names(name)
        hint = f" Similar names in the catalogue: {', '.join(near)}." if near else ""
        raise UserError(
            f"There is no weight file {name} ({os.path.abspath(path)}). Set MODEL.WEIGHTS to the "
            f"path of an existing file.{hint}"
        )
    return path, family


def examine_config_weights(cfg: CfgNode, weights: str | None = None) -> Source | None:
    """Examine the weight file of a config.

    Args:
        cfg: The config.
        weights: The file to use instead of ``MODEL.WEIGHTS``, such as the checkpoint of a resumed
            run.

    Returns:
        The examined file; None for an empty name.

    Raises:
        UserError: The file can't be read, or its family is unknown.
    """
    # MODEL.WEIGHTS_FAMILY describes MODEL.WEIGHTS only. A checkpoint states its own family.
    is_other = weights is not None and weights != cfg.MODEL.WEIGHTS
    family = None if is_other else cfg.MODEL.WEIGHTS_FAMILY or None
    name = cfg.MODEL.WEIGHTS if weights is None else weights
    return examine(*local_weights(name, family)) if name else None


def apply_file_geometry(cfg: CfgNode, weights: str | Source | None = None) -> list[Change]:
    """Set the config keys that the network of the weight file needs.

    Call this before building the model. The keys are the stride placement, stem pool, channel
    order, mean and std, and those of the SE layers: biases, rounding of the hidden widths, and a
    ReLU before the gate. Changes are logged as a table. With ``MODEL.WEIGHTS_PIN`` the config is
    not changed.

    Args:
        cfg: The config, which is changed in place even if it is frozen.
        weights: The file to use instead of ``MODEL.WEIGHTS`` (such as the last checkpoint of a
            resumed run), by name or examined. An empty name changes nothing.

    Returns:
        The changes.

    Raises:
        UserError: The file can't be read, its family is unknown, or it contradicts a config with
            ``MODEL.WEIGHTS_PIN``.
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
            f"MODEL.WEIGHTS_PIN keeps the config's values, but {source.path}, detected as "
            f"{source.detected_as}, was trained with others:\n{table}\nSet the keys to the file's "
            "values, or MODEL.WEIGHTS_PIN to False."
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
    """Return the config keys that the file determines, with the file's values."""
    wanted = {OPTION_KEYS[name]: value for name, value in source.geometry.options().items()}
    if source.preprocessing:
        wanted["INPUT.FORMAT"] = source.preprocessing.format
        wanted["MODEL.PIXEL_MEAN"] = list(source.preprocessing.mean)
        wanted["MODEL.PIXEL_STD"] = list(source.preprocessing.std)
    arch = source.architecture
    if arch and arch.se_stages and arch.se_ratio == cfg.MODEL.SE.RATIO:
        wanted["MODEL.SE.DIVISOR"] = arch.se_divisor
        # True is never set here: if only the config lacks biases, loading raises an error.
        if not arch.se_bias:
            wanted["MODEL.SE.BIAS"] = False
    return wanted


def _equal(first: Any, second: Any) -> bool:
    if isinstance(second, list):
        return same_pixels(first, second)
    return first == second
