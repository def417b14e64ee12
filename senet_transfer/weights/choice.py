"""Selection of the network and tensors to load from a weight file."""

from collections.abc import Iterator
from typing import Any, TypedDict

from detectron2.config import CfgNode

from senet_transfer.config.defaults import FILE_KEYS, config_value
from senet_transfer.errors import UserError, check_choice
from senet_transfer.weights.families.statements import WIDE_RESNET
from senet_transfer.weights.hub.timm_networks import is_timm

HEADS = ("strict", "ignore")


class Choice(TypedDict, total=False):
    """Keyword arguments of :func:`~.mapping.source.examine` that select a network in a weight file.

    Attributes:
        prefix: Prefix of the network's tensor names; None for a file with a single network.
        ema: Whether to load the averaged (EMA) weights. With None or "auto", the convention of the
            project that saved the file applies.
        head: "strict", or "ignore" to load only the backbone; see
            :func:`senet_transfer.load_weights`.
        stated: Values that the user has set for fields of :class:`Geometry` (such as the stride
            placement) and :class:`Preprocessing`, by field name.
        network: Name of a model that timm builds, such as "timm/regnety_002"; empty for other
            models.
    """

    prefix: str | None
    ema: bool | str | None
    head: str
    stated: tuple[tuple[str, Any], ...]
    network: str


# Names of the fields of Geometry and Preprocessing, and their config keys.
FILE_OPTIONS = {
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "stem_pool": "MODEL.RESNETS.STEM_POOL",
    "se_relu_before": "MODEL.SE.RELU_BEFORE",
    "format": "INPUT.FORMAT",
    "mean": "MODEL.PIXEL_MEAN",
    "std": "MODEL.PIXEL_STD",
}


def kept_keys(cfg: CfgNode) -> tuple[str, ...]:
    """Return the config keys whose values must not be replaced by those in a weight file."""
    return FILE_KEYS if cfg.MODEL.WEIGHTS_PIN else tuple(cfg.MODEL.WEIGHTS_KEEP)


def stated_values(cfg: CfgNode) -> tuple[tuple[str, Any], ...]:
    """Return the config values that a weight file must not replace, as (field name, value) pairs.

    The fields are those of :class:`Geometry` and :class:`Preprocessing`.
    """
    if cfg.MODEL.BACKBONE.ARCH == WIDE_RESNET:
        return (*_kept_values(cfg), ("stem_pool", "none"))
    return tuple(_kept_values(cfg))


def _kept_values(cfg: CfgNode) -> Iterator[tuple[str, Any]]:
    kept = kept_keys(cfg)
    for name, key in FILE_OPTIONS.items():
        if key in kept:
            value = config_value(cfg, key)
            yield name, tuple(value) if isinstance(value, list | tuple) else value


def config_choice(cfg: CfgNode) -> Choice:
    """Return the options in a config that select a network in the file ``MODEL.WEIGHTS``.

    Raises:
        UserError: If a value is invalid.
    """
    check_choice("MODEL.WEIGHTS_HEAD", cfg.MODEL.WEIGHTS_HEAD, HEADS)
    return Choice(
        prefix=cfg.MODEL.WEIGHTS_PREFIX or None,
        ema=checked_ema(cfg.MODEL.WEIGHTS_EMA),
        head=cfg.MODEL.WEIGHTS_HEAD,
        stated=stated_values(cfg),
        network=cfg.MODEL.BACKBONE.ARCH if is_timm(cfg.MODEL.BACKBONE.ARCH) else "",
    )


def checked_ema(ema: bool | str | None) -> bool | None:
    """Check the ``ema`` option, and return it with "auto" replaced by None.

    Raises:
        UserError: If the value is invalid.
    """
    if ema in (None, "auto"):
        return None
    if not isinstance(ema, bool):
        raise UserError(f"ema is {ema!r}; expected True, False, None or 'auto'.")
    return ema
