"""A config that takes the geometry of the file it starts from."""

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

# The config keys of `Source.options`.
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
    """A config key that took another value from a weight file."""

    key: str
    before: Any
    after: Any


def local_weights(name: str, family: str | None = None) -> tuple[str, str | None]:
    """The file that is meant by ``MODEL.WEIGHTS``, and its family.

    Args:
        name: a path, a name in the catalogue or an address; the latter two are fetched into a
            cache.
        family: what the user says the family is, or None; a name in the catalogue has one.

    Raises:
        UserError: there is no such file, or it can't be fetched.
    """
    place, family = locate_weights(name, family)
    try:
        path = PathManager.get_local_path(str(place))
    except Exception as error:  # every handler of a scheme raises what it likes
        raise UserError(f"The weights {name} can't be fetched: {error}.") from error
    if not os.path.isfile(path):
        near = nearest_names(name)
        hint = f" Or was {' or '.join(near)} meant, of the catalogue?" if near else ""
        raise UserError(
            f"There is no weight file {name} ({os.path.abspath(path)}). Put it there, or set "
            f"MODEL.WEIGHTS to where it is.{hint}"
        )
    return path, family


def examine_config_weights(cfg: CfgNode, weights: str | None = None) -> Source | None:
    """Examine the weight file of a config.

    Args:
        cfg: the config.
        weights: the file, if it is not ``MODEL.WEIGHTS``, such as the checkpoint of a resumed run.

    Returns:
        The examined file; None for an empty name.

    Raises:
        UserError: the file can't be read or is of no known family.
    """
    # The family is that of MODEL.WEIGHTS; a checkpoint states its own.
    is_other = weights is not None and weights != cfg.MODEL.WEIGHTS
    family = None if is_other else cfg.MODEL.WEIGHTS_FAMILY or None
    name = cfg.MODEL.WEIGHTS if weights is None else weights
    return examine(*local_weights(name, family)) if name else None


def apply_file_geometry(cfg: CfgNode, weights: str | Source | None = None) -> list[Change]:
    """Give a config what its weight file needs, before the model is built.

    These are stride placement, stem pool, channel order, mean and std, and of SE layers whether
    they have biases, their rounding and a ReLU before the gate. What changes is logged as a table.
    With ``MODEL.WEIGHTS_PIN`` the config stays as it is.

    Args:
        cfg: changed in place, frozen or not.
        weights: the file, if it is not ``MODEL.WEIGHTS`` (a resumed run starts from its last
            checkpoint) or is already examined. An empty name changes nothing.

    Returns:
        The keys that changed.

    Raises:
        UserError: the file can't be read or is of no known family; or it contradicts a pinned
            config.
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
            f"MODEL.WEIGHTS_PIN keeps the config's values, and {source.path}, taken for "
            f"{source.taken_for}, was trained with others:\n{table}\nSet the keys to the file's "
            "values, or MODEL.WEIGHTS_PIN to False."
        )
    frozen = cfg.is_frozen()
    cfg.defrost()
    for change in changes:
        node, _, leaf = change.key.rpartition(".")
        config_value(cfg, node)[leaf] = change.after
    if frozen:
        cfg.freeze()
    logger.info("Taken from %s (%s):\n%s", source.path, source.taken_for, table)
    return changes


def _changes(cfg: CfgNode, source: Source) -> list[Change]:
    wanted = [(key, config_value(cfg, key), value) for key, value in _wanted(cfg, source).items()]
    return [Change(key, own, value) for key, own, value in wanted if not _equal(own, value)]


def _wanted(cfg: CfgNode, source: Source) -> dict[str, Any]:
    """The keys that matter for the file's network, with its values."""
    wanted = {OPTION_KEYS[name]: value for name, value in source.geometry.options().items()}
    if source.preprocessing:
        wanted["INPUT.FORMAT"] = source.preprocessing.format
        wanted["MODEL.PIXEL_MEAN"] = list(source.preprocessing.mean)
        wanted["MODEL.PIXEL_STD"] = list(source.preprocessing.std)
    arch = source.architecture
    if arch and arch.se_stages and arch.se_ratio == cfg.MODEL.SE.RATIO:
        wanted["MODEL.SE.DIVISOR"] = arch.se_divisor
        # The other way round, biases would be dropped from the file, which loading refuses.
        if not arch.se_bias:
            wanted["MODEL.SE.BIAS"] = False
    return wanted


def _equal(first: Any, second: Any) -> bool:
    if isinstance(second, list):
        return same_pixels(first, second)
    return first == second
