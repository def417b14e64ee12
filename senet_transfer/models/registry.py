"""Model registry, and construction of registered models by name."""

import difflib
import fnmatch
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Unpack, get_args, get_type_hints

from detectron2.modeling import Backbone
from torch import nn

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.fused.functions import check_fused, set_fused
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.preprocessing import Preprocessing, channels_of
from senet_transfer.weights.choice import Choice
from senet_transfer.weights.families.statements import WIDE_RESNET
from senet_transfer.weights.hub.catalogue import locate_weights
from senet_transfer.weights.hub.timm_networks import is_timm
from senet_transfer.weights.load import load_source
from senet_transfer.weights.mapping.source import Source, examine

logger = logging.getLogger(__name__)

# Descriptions of argument types in error messages.
_KINDS = {int: "an integer >= {}", str: "a string", bool: "True or False", NoneType: "None"}

NORMS = ("BN", "FrozenBN", "SyncBN", "GN")

_SE_OVERRIDES = tuple(f"se_{field.name}" for field in fields(SEOptions))


@dataclass(frozen=True)
class ModelEntry:
    """Registered model, which can be built by name.

    Attributes:
        name: Name of the model.
        build: Function that builds the backbone. It takes only keyword arguments, which include
            ``se: SEOptions | None``, ``norm``, ``out_features`` and ``freeze_at``.
        fixed: Arguments of ``build`` that are determined by the model name.
        has_se: Whether the backbone has SE.
        dropout: Default dropout probability before a classifier's linear layer.
        preprocessing: Preprocessing for training from scratch.
        neck: Function that builds the module between a classifier's last feature map and its linear
            layer. It takes the number of channels of the feature map and ``dropout``. The module
            must have an attribute ``out_channels``. None uses global average pooling.
        pooled: Name of the backbone output that a classifier uses; empty for the last feature map.
    """

    name: str
    build: Callable[..., Backbone]
    fixed: dict[str, Any]
    has_se: bool
    dropout: float = 0.0
    preprocessing: Preprocessing = Preprocessing()
    neck: Callable[..., nn.Module] | None = None
    pooled: str = ""

    @property
    def network(self) -> str:
        """Return the model name if timm builds the network, or an empty string otherwise."""
        return self.name if is_timm(self.name) else ""

    def options(self) -> list[str]:
        """Return the names of the ``build`` arguments that the model name does not determine."""
        found = inspect.signature(self.build).parameters.items()
        named = [name for name, option in found if option.kind is not option.VAR_KEYWORD]
        return [name for name in named if name not in self.fixed and name != "se"]


_MODELS: dict[str, ModelEntry] = {}

# Keys are name patterns, whose named groups are integer arguments of `build`.
_FAMILIES: dict[str, ModelEntry] = {}

# Keys are name prefixes for models from other packages. Each value consists of a function that
# returns the model with a given name and a function that returns the names that match a pattern.
_PREFIXES: dict[str, tuple[Callable[[str], ModelEntry], Callable[[str], list[str]]]] = {}


def register_model(
    name: str,
    build: Callable[..., Backbone],
    *,
    has_se: bool = False,
    dropout: float = 0.0,
    preprocessing: Preprocessing = Preprocessing(),
    neck: Callable[..., nn.Module] | None = None,
    **fixed: object,
) -> None:
    """Register a model by name. The arguments are the fields of :class:`ModelEntry`."""
    _MODELS[name] = ModelEntry(name, build, fixed, has_se, dropout, preprocessing, neck)


def register_with_se(name: str, build: Callable[..., Backbone], **options: Any) -> None:
    """Register a model as ``name``, and its counterpart with SE as ``se_<name>``."""
    register_model(name, build, **options)
    register_model(f"se_{name}", build, has_se=True, **options)


def register_family(
    pattern: str,
    build: Callable[..., Backbone],
    *,
    preprocessing: Preprocessing = Preprocessing(),
    **fixed: object,
) -> None:
    """Register all models whose name, without the prefix ``se_``, matches a pattern.

    :func:`list_models` does not include these models, because their number is unlimited.

    Args:
        pattern: Regular expression for the whole name, such as ``"wrn(?P<depth>[0-9]+)"``. Its
            named groups match integers that are passed to ``build`` as keyword arguments.
        build: See :class:`ModelEntry`.
        preprocessing: See :class:`ModelEntry`.
        fixed: See :class:`ModelEntry`.
    """
    _FAMILIES[pattern] = ModelEntry(pattern, build, fixed, False, preprocessing=preprocessing)


def register_prefix(
    prefix: str, entry: Callable[[str], ModelEntry], names: Callable[[str], list[str]]
) -> None:
    """Register all models whose names start with a prefix, such as timm's networks.

    Args:
        prefix: Prefix, such as "timm/".
        entry: Function that returns the model for a given name, or raises a UserError.
        names: Function that returns the names that match a shell-style pattern with this prefix.
    """
    _PREFIXES[prefix] = (entry, names)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the models that match a shell-style pattern, such as "se_*".

    For CIFAR ResNets and wide ResNets, the list contains only the sizes in the SENet paper. Other
    depths and widths can also be built by name, for example ``cifar_resnet20`` and ``se_wrn28_10``.
    A pattern such as "timm/regnety*" lists timm's networks instead.
    """
    for prefix, (_, names) in _PREFIXES.items():
        if pattern.startswith(prefix):
            return sorted(names(pattern))
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_entry(name: str) -> ModelEntry:
    """Return the registered model called ``name``.

    Raises:
        UserError: If there is no model with this name.
    """
    for prefix, (prefixed, _) in _PREFIXES.items():
        if isinstance(name, str) and name.startswith(prefix):
            return prefixed(name)
    entry = (_MODELS.get(name) or _family_entry(name)) if isinstance(name, str) else None
    if entry is None:
        near = difflib.get_close_matches(str(name), _MODELS, n=4, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"There is no model called {name!r}. {hint}Call senet_transfer.list_models() for a "
            "list of all models."
        )
    return entry


def _family_entry(name: str) -> ModelEntry | None:
    for pattern, family in _FAMILIES.items():
        match = re.fullmatch(pattern, name.removeprefix("se_"))
        if match:
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            fixed = {**family.fixed, **numbers}
            return replace(family, name=name, fixed=fixed, has_se=name.startswith("se_"))
    return None


def build_backbone(
    entry: ModelEntry,
    source: Source | None = None,
    *,
    out_features: list[str] | None = None,
    norm: str = "BN",
    fused: str | bool = "auto",
    **overrides: Any,
) -> Backbone:
    """Build the backbone of a registered model, and set its ``preprocessing`` attribute.

    Args:
        entry: Registered model.
        source: Weight file that determines layer options of the network, such as the stride
            placement. Its weights are not loaded.
        out_features: Names of the stages whose outputs are returned; None for the last stage.
        norm: Detectron2 norm name, such as "BN".
        fused: "auto", True or False; see :func:`create_backbone`.
        overrides: Further arguments of ``entry.build``, and fields of :class:`SEOptions` with the
            prefix ``se_``.

    Raises:
        UserError: If the model does not support an option, an option contradicts the network in the
            file, or a value is invalid.
    """
    overrides = _with_file_options(entry, source, overrides)
    se = {key[3:]: overrides.pop(key) for key in _SE_OVERRIDES if key in overrides}
    if se and entry.network:
        raise UserError(
            f"se_{next(iter(se))} can't be set for {entry.name}, because timm builds this "
            "network's SE layers, if any. Remove the option, or use one of this project's "
            "networks."
        )
    if se and not entry.has_se:
        raise UserError(
            f"{entry.name} has no SE layers, so se_{next(iter(se))} can't be set. Use a model "
            "whose name starts with se_."
        )
    unknown = [key for key in overrides if key not in entry.options()]
    if unknown:
        known = [*entry.options(), *(_SE_OVERRIDES if entry.has_se else ()), "fused"]
        raise UserError(
            f"{entry.name} has no option {unknown[0]!r}. Its options are "
            f"{', '.join(sorted(known))}."
        )
    check_choice("The norm", norm, NORMS)
    check_fused(fused)
    _check_types(entry.build, {**entry.fixed, **overrides})
    if "stages" in se:
        stages = se["stages"]
        se["stages"] = tuple(stages) if isinstance(stages, list | tuple) else (stages,)
    backbone = entry.build(
        **entry.fixed,
        se=SEOptions(**se) if entry.has_se else None,
        out_features=out_features,
        norm=norm,
        **overrides,
    )
    backbone.preprocessing = _pixels(entry.preprocessing, overrides.get("in_channels", 3), source)
    set_fused(backbone, fused)
    return backbone


def _pixels(pixels: Preprocessing, channels: int, source: Source | None) -> Preprocessing:
    """Return the preprocessing of a model with the given number of input channels.

    If the image format of the weight file is "C" followed by this number (such as "C5"), return the
    file's preprocessing. Otherwise, convert ``pixels``, the registered model's preprocessing, to
    this number of channels.
    """
    own = source.preprocessing if source else None
    if own and channels_of(own.format) == channels:
        return own
    if channels == 3:
        return pixels
    return pixels.grey() if channels == 1 else pixels.with_channels(channels)


def _check_types(build: Callable[..., Backbone], arguments: dict[str, Any]) -> None:
    """Raise a UserError if an argument has the wrong type or is an integer that is too small."""
    hints = get_type_hints(build)
    for name in hints.keys() & arguments:
        value, kinds = arguments[name], get_args(hints[name]) or (hints[name],)
        least = 0 if name == "freeze_at" else 1
        if type(value) not in kinds or (type(value) is int and value < least):
            words = " or ".join(_KINDS[kind].format(least) for kind in kinds)
            raise UserError(f"{name} is {value!r}; expected {words}.")


def create_backbone(
    name: str,
    weights: str | Path | None = None,
    family: str | None = None,
    *,
    prefix: str | None = None,
    ema: bool | str | None = None,
    head: str = "strict",
    out_features: list[str] | None = None,
    norm: str = "BN",
    fused: str | bool = "auto",
    **overrides: Any,
) -> Backbone:
    """Build a Detectron2 ``Backbone`` by name.

    By default, no stages are frozen. Without weights, ResNets and ResNeXts have stride 2 in the 3x3
    convolutions of bottlenecks, a padded max pool in the stem, and torchvision's preprocessing.
    With weights, the stride placement, the padding of this max pool and the preprocessing are
    determined from the file. The paper's 3.86 GMACs for SE-ResNet-50 require
    ``stride_in_1x1=True``.
    Inception-ResNet-v2 has unpadded convolutions by default, as published; use ``padding="same"``
    for detectors.

    Args:
        name: Model name; see :func:`list_models`. "timm/NAME" selects a network built by timm.
        weights: Path of a weight file of any family, or a name from ``list_catalogue()``; see
            :func:`senet_transfer.load_weights`. For a network built by timm, pass a file with its
            state dict, or "timm/NAME" with the name of pretrained weights.
        family: Weight family of the file, such as "torchvision". Required only if several families
            use the same tensor names.
        prefix: Prefix of the network's tensor names in a file with several networks. See
            :func:`senet_transfer.load_weights` for details of ``prefix``, ``ema`` and ``head``.
        ema: Whether to load the averaged (EMA) weights. None follows the convention of the project
            that saved the file.
        head: "strict", or "ignore" to load a file without its classifier or projection head.
        out_features: Names of the stages whose outputs are returned: "stem" and "res2" to "res5".
            None for the last stage.
        norm: "BN", "FrozenBN", "SyncBN" or "GN", as in Detectron2.
        fused: Whether fused Triton kernels compute the norms, gates, additions and ReLUs of
            residual blocks. "auto" uses them on a GPU, False never uses them, and True raises an
            error if the device is not a GPU. Weights and checkpoints do not depend on this option.
        overrides: Network options, such as ``stride_in_1x1=True``, ``stem_pool="ceil"``,
            ``freeze_at=2``, ``se_ratio=8`` and ``se_placement="pre"``.

    Returns:
        A backbone that maps images ``(N, 3, H, W)`` to a dict of feature maps by name. The
        backbone's attribute ``preprocessing`` describes the required preprocessing.

    Raises:
        UserError: If a name or option is unknown, a value is invalid, the weights do not match
            the network, or an option contradicts the network in the file.
    """
    entry = model_entry(name)
    stated = stated_options(entry, overrides)
    source = examine_weights(
        weights, family, prefix=prefix, ema=ema, head=head, stated=stated, network=entry.network
    )
    backbone = build_backbone(
        entry, source, out_features=out_features, norm=norm, fused=fused, **overrides
    )
    if source is not None:
        load_source(backbone, source)
    elif norm == "FrozenBN":
        logger.warning(
            "%s is built with norm='FrozenBN' and without weights: its norms have mean 0 and "
            "variance 1, and training does not change these statistics. Pass weights=, or call "
            "senet_transfer.load_weights(backbone, path) before using it.",
            name,
        )
    return backbone


def examine_weights(
    weights: str | Path | None, family: str | None, **choice: Unpack[Choice]
) -> Source | None:
    """Read a model's weight file and detect its network; see :func:`examine`.

    If no weights are specified, return None.
    """
    if weights is not None:
        path, family = locate_weights(weights, family)
        return examine(path, family, **choice)
    if family is not None:
        raise UserError(
            f"family is {family!r}, but no weights are given. Set weights, or remove family."
        )
    return None


def stated_options(entry: ModelEntry, overrides: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the network options that take precedence over values inferred from a weight file.

    Args:
        entry: The registered model.
        overrides: The network options specified by the user.
    """
    if entry.name == WIDE_RESNET:
        return (("stem_pool", "none"),)
    names = ("stride_in_1x1", "stem_pool", "se_relu_before")
    return tuple((name, overrides[name]) for name in names if name in overrides)


def _with_file_options(
    entry: ModelEntry, source: Source | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Return the user's network options, extended with the options of the network in a weight file.

    Raises:
        UserError: If an option set by the user contradicts the network in the file.
    """
    if source is None:
        return overrides
    if not source.geometry.has_pool and "stem_pool" in entry.options():
        raise UserError(
            f"{source.path} contains {source.model_name}, which has no max pool in its stem, but "
            f"the model is {entry.name}. Use the model {source.model_name} "
            f"(MODEL.BACKBONE.ARCH {source.model_name})."
        )
    known = [*entry.options(), *(_SE_OVERRIDES if entry.has_se else ())]
    stated = {key: value for key, value in source.options().items() if key in known}
    if source.preprocessing and len(source.preprocessing.mean) != 3:
        stated["in_channels"] = len(source.preprocessing.mean)
    for key, value in stated.items():
        given = overrides.get(key, value)
        if (tuple(given) if key == "se_stages" else given) != value:
            raise UserError(
                f"{key}={given!r} contradicts the network in {source.path}, which has {key}="
                f"{value!r}. The file was detected as {source.detected_as}. Remove the option, or "
                "use different weights."
            )
    return {**overrides, **stated}
