"""The models by name, and their construction from Python."""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from detectron2.modeling import Backbone
from torch import nn

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights.hub.catalogue import locate_weights
from senet_transfer.weights.load import load_source
from senet_transfer.weights.mapping.source import Source, examine

# In messages: the types of a builder's arguments.
_KINDS = {int: "a whole number from 1 on", str: "a word", bool: "True or False", NoneType: "None"}

NORMS = ("BN", "FrozenBN", "SyncBN", "GN")

_SE_OVERRIDES = tuple(f"se_{field.name}" for field in fields(SEOptions))


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be built by name.

    Attributes:
        name: what users type.
        build: the function that builds its backbone, from keyword arguments alone; among them
            ``se: SEOptions | None``, ``norm``, ``out_features`` and ``freeze_at``.
        fixed: the arguments that the name stands for.
        has_se: whether the backbone has SE.
        dropout: before the classifier, 0-1.
        preprocessing: what the network expects of an image when it is trained from scratch.
        neck: what a classifier has between the last feature map and its linear layer, a module
            with ``out_channels`` from the map's channels and ``dropout``; None is the average
            over the map.
    """

    name: str
    build: Callable[..., Backbone]
    fixed: dict[str, Any]
    has_se: bool
    dropout: float = 0.0
    preprocessing: Preprocessing = Preprocessing()
    neck: Callable[..., nn.Module] | None = None

    def options(self) -> list[str]:
        """The arguments of ``build`` that the name leaves open."""
        found = inspect.signature(self.build).parameters.items()
        named = [name for name, option in found if option.kind is not option.VAR_KEYWORD]
        return [name for name in named if name not in self.fixed and name != "se"]


_MODELS: dict[str, ModelEntry] = {}

# By a pattern whose named groups are numbers that `build` takes.
_FAMILIES: dict[str, ModelEntry] = {}


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
    """Makes a model known by name; arguments as the fields of :class:`ModelEntry`."""
    _MODELS[name] = ModelEntry(name, build, fixed, has_se, dropout, preprocessing, neck)


def register_with_se(name: str, build: Callable[..., Backbone], **options: Any) -> None:
    """Makes a model known as ``name``, and its twin with SE as ``se_<name>``."""
    register_model(name, build, **options)
    register_model(f"se_{name}", build, has_se=True, **options)


def register_family(
    pattern: str,
    build: Callable[..., Backbone],
    *,
    preprocessing: Preprocessing = Preprocessing(),
    **fixed: object,
) -> None:
    """Makes all models known whose name, or the part after ``se_``, matches a pattern.

    They aren't listed, since there is no end of them.

    Args:
        pattern: a regular expression for the whole name; its named groups match numbers, which
            ``build`` takes under these names, such as ``"wrn(?P<depth>[0-9]+)"``.
        build: as in :class:`ModelEntry`, as all else.
        preprocessing: likewise.
        fixed: likewise.
    """
    _FAMILIES[pattern] = ModelEntry(pattern, build, fixed, False, preprocessing=preprocessing)


def list_models(pattern: str = "*") -> list[str]:
    """The names of the models that match a shell-style pattern, such as "se_*".

    These are the paper's. CIFAR networks of other depths and widths exist by name too:
    ``cifar_resnet20``, ``se_wrn28_10``.
    """
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_entry(name: str) -> ModelEntry:
    """The model of this name.

    Raises:
        UserError: no model has it.
    """
    entry = (_MODELS.get(name) or _family_entry(name)) if isinstance(name, str) else None
    if entry is None:
        near = difflib.get_close_matches(str(name), _MODELS, n=4, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"There is no model {name!r}. {hint}senet_transfer.list_models() names all of them."
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
    **overrides: Any,
) -> Backbone:
    """Build the backbone of a registered model, with the attribute ``preprocessing``.

    Args:
        entry: the model.
        source: the weight file that the model will be filled from, whose geometry it gets.
        out_features: the stages to return, by name; None is the last one.
        norm: Detectron2's name of a norm.
        overrides: further arguments of ``entry.build``, and those of :class:`SEOptions` with
            ``se_`` before the name.

    Raises:
        UserError: an override that the model does not have or that the file contradicts; an
            invalid value.
    """
    overrides = _with_file_options(entry, source, overrides)
    se = {key[3:]: overrides.pop(key) for key in _SE_OVERRIDES if key in overrides}
    if se and not entry.has_se:
        raise UserError(f"{entry.name} has no SE, so se_{next(iter(se))} can't be set. Take se_*.")
    unknown = [key for key in overrides if key not in entry.options()]
    if unknown:
        known = [*entry.options(), *(_SE_OVERRIDES if entry.has_se else ())]
        raise UserError(
            f"{entry.name} has no option {unknown[0]!r}. It has: {', '.join(sorted(known))}."
        )
    check_choice("The norm", norm, NORMS)
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
    backbone.preprocessing = entry.preprocessing
    return backbone


def _check_types(build: Callable[..., Backbone], arguments: dict[str, Any]) -> None:
    """Raises UserError for an argument of another type than annotated, or a number below 1."""
    hints = get_type_hints(build)
    hints.pop("freeze_at", None)  # can be 0, and is checked where the stages are known
    for name in hints.keys() & arguments:
        value, kinds = arguments[name], get_args(hints[name]) or (hints[name],)
        if type(value) not in kinds or (type(value) is int and value < 1):
            words = " or ".join(_KINDS[kind] for kind in kinds)
            raise UserError(f"{name} is {value!r}, expected {words}.")


def create_backbone(
    name: str,
    weights: str | Path | None = None,
    family: str | None = None,
    *,
    out_features: list[str] | None = None,
    norm: str = "BN",
    **overrides: Any,
) -> Backbone:
    """Builds a backbone by name, as a Detectron2 ``Backbone``.

    Without weights, every residual backbone has stride 2 in the 3x3 convolution, the padded stem
    pool, nothing frozen, and torchvision's preprocessing. The paper's 3.86 GMACs of SE-ResNet-50
    are with ``stride_in_1x1=True``. With weights, it has what the file's network has.
    Inception-ResNet-v2 is the published network, whose maps lose their borders: a detector wants
    ``padding="same"``.

    Args:
        name: one of :func:`list_models`.
        weights: a weight file of any family, or a name of ``list_catalogue()``; see
            :func:`senet_transfer.load_weights`.
        family: the file's family, where its names are those of several.
        out_features: the stages to return, of "stem", "res2" ... "res5"; None is the last one.
        norm: "BN", "FrozenBN", "SyncBN" or "GN", as in Detectron2.
        overrides: the network's options: ``stride_in_1x1=True``, ``stem_pool="ceil"``,
            ``freeze_at=2``, ``se_ratio=8``, ``se_placement="pre"``, ...

    Returns:
        A backbone that maps ``(N, 3, H, W)`` to a dict of feature maps by name. Its
        ``preprocessing`` says what it expects of an image.

    Raises:
        UserError: an unknown name or option, a value that makes no sense; a file that does not fit
            the network, or whose network an override contradicts.
    """
    entry = model_entry(name)
    source = examine_weights(weights, family)
    backbone = build_backbone(entry, source, out_features=out_features, norm=norm, **overrides)
    if source is not None:
        load_source(backbone, source)
    return backbone


def examine_weights(weights: str | Path | None, family: str | None) -> Source | None:
    """Examine the file that a model is created with; None without one."""
    if weights is not None:
        return examine(*locate_weights(weights, family))
    if family is not None:
        raise UserError(f"family={family!r} says what the file in weights= is, and there is none.")
    return None


def _with_file_options(
    entry: ModelEntry, source: Source | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Return ``overrides`` with the options of a file's network added.

    Raises:
        UserError: an override contradicts the file.
    """
    if source is None:
        return overrides
    known = [*entry.options(), *(_SE_OVERRIDES if entry.has_se else ())]
    stated = {key: value for key, value in source.options().items() if key in known}
    for key, value in stated.items():
        given = overrides.get(key, value)
        if (tuple(given) if key == "se_stages" else given) != value:
            raise UserError(
                f"{key}={given!r} contradicts {source.path}: the network of this file, taken for "
                f"{source.taken_for}, has {value!r}. Leave the option out, or take other weights."
            )
    return {**overrides, **stated}
