"""Reading of weight files, and detection of their weight family and network architecture."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from senet_transfer.errors import UserError, check_choice
from senet_transfer.preprocessing import Preprocessing, same_pixels
from senet_transfer.utils.read_once import once_per_file
from senet_transfer.utils.text import first_of
from senet_transfer.weights.choice import HEADS, checked_ema
from senet_transfer.weights.families import renaming as names
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.caffe_geometry import adjust_variances, stated_geometry
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.families.registry import FAMILIES, Family, unsupported_reason
from senet_transfer.weights.families.statements import (
    Statements,
    lookalikes,
    named_model,
    statements_of,
)
from senet_transfer.weights.families.timm_network import TIMM_NETWORK, stated_network, timm_family
from senet_transfer.weights.formats.reader import OWN_METADATA, WeightFile, read_tensors
from senet_transfer.weights.formats.tensor_names import Wanted, outside_prefix
from senet_transfer.weights.formats.timm_config import train_options
from senet_transfer.weights.hub.catalogue import Entry, published_entries
from senet_transfer.weights.hub.timm_networks import timm_preprocessing
from senet_transfer.weights.mapping.networks import Network, contains_network, only_network
from senet_transfer.weights.mapping.normalise import (
    EPS,
    convert_dtypes,
    drop_background,
    expand_affine,
    fold_biases,
    repair_counters,
    reshaped,
)
from senet_transfer.weights.mapping.own_metadata import class_names, own_network, own_options

logger = logging.getLogger(__name__)

_GEOMETRY = frozenset(field.name for field in fields(Geometry))
_PIXELS = frozenset({"format", "mean", "std"})


@dataclass(frozen=True)
class Source:
    """Content of a weight file, with the network that :func:`examine` detected in the file.

    Attributes:
        path: Path of the file.
        family: Weight family, as specified by the user or detected.
        alternatives: Other weight families with the same tensor names and shapes, each with a
            description of how its layer options and preprocessing differ.
        tensors: Tensors by their names in this project. Backbone names have no prefix, even in a
            classifier or a detector.
        original: Name of each tensor in the file, by its name in this project.
        unknown: Tensor names in the file that are unknown in the weight family.
        prefix: Prefix that was removed from the file's tensor names.
        outside: Names in ``unknown`` that do not have the prefix.
        notes: Notes for the user, for example about changes to the tensors.
        architecture: Backbone architecture; None if it is unknown.
        geometry: Layer options of the backbone that tensor shapes do not determine, such as the
            stride placement. Unknown fields are None.
        preprocessing: Preprocessing that the network expects; None if it is unknown.
        detector: Whether the file contains tensors outside the backbone and the classifier.
        ignored: Names (in the file) of intentionally omitted tensors, with the reasons.
        head: Names in ``unknown`` that do not belong to the backbone but, for example, to a
            projection head.
        lookalikes: Names of other projects' networks with the same tensor names and shapes but
            different outputs, if the file may contain one of these networks.
        recorded: Names of the :class:`Geometry` and :class:`Preprocessing` fields that the file
            itself or the catalogue specifies. Other fields are inferred from the tensor names.
        classes: Class names in the order of the network's outputs; empty if they are unknown.
        network: Model name, such as "timm/regnety_002", if timm builds the network; otherwise
            empty.
    """

    path: str
    family: Family
    alternatives: dict[str, str]
    tensors: dict[str, Tensor]
    original: dict[str, str]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    architecture: Architecture | None
    geometry: Geometry
    preprocessing: Preprocessing | None
    detector: bool
    prefix: str = ""
    outside: tuple[str, ...] = ()
    ignored: dict[str, str] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    lookalikes: tuple[str, ...] = ()
    recorded: frozenset[str] = frozenset()
    classes: tuple[str, ...] = ()
    network: str = ""

    @property
    def detected_as(self) -> str:
        """Return the name and description of the file's weight family, for error messages."""
        return f"{self.family.name} ({self.family.title})"

    @property
    def model_name(self) -> str:
        """Return the network's model name, or "" if its architecture is unknown.

        If no registered model has this architecture, a description is returned instead.
        """
        return self.network or named_model(self.architecture, self.geometry)

    @property
    def num_classes(self) -> int:
        """Return the number of classifier outputs, or 0 if there is no classifier."""
        weight = self.tensors.get("linear.weight")
        return len(weight) if weight is not None and weight.ndim else 0

    def options(self) -> dict[str, Any]:
        """Return the known options of the network as keyword arguments for ``create_backbone``."""
        options = self.geometry.options()
        arch = self.architecture
        if arch and arch.se_stages:
            options |= {"se_bias": arch.se_bias, "se_stages": arch.se_stages}
            if arch.se_ratio:
                options |= {"se_ratio": arch.se_ratio, "se_divisor": arch.se_divisor}
        return options

    def backbone_only(self) -> "Source":
        """Return a copy of this source with only the backbone's tensors."""
        tensors = {n: tensor for n, tensor in self.tensors.items() if n.startswith(names.BACKBONE)}
        return replace(
            self,
            tensors=tensors,
            original={name: name for name in tensors},
            unknown=(),
            detector=False,
        )


@once_per_file
def examine(
    path: str | Path,
    family: str | None = None,
    *,
    prefix: str | None = None,
    ema: bool | str | None = None,
    head: str = "strict",
    stated: tuple[tuple[str, Any], ...] = (),
    network: str = "",
) -> Source:
    """Read a weight file and detect its weight family, architecture and preprocessing.

    Args:
        path: Path of the file.
        family: Name of the file's weight family. If None, the family is detected. If several
            families match, the first one in ``FAMILIES`` is assumed and the other families are
            logged. If their preprocessing differs, the log message is a warning.
        prefix: Prefix of the network's tensor names. See :func:`senet_transfer.load_weights` for
            details of ``prefix``, ``ema`` and ``head``.
        ema: Whether to use the averaged weights.
        head: "strict" or "ignore".
        stated: Names and values of :class:`Geometry` and :class:`Preprocessing` fields that the
            user has specified; see :func:`with_stated`.
        network: Model name, such as "timm/regnety_002", if timm builds the network; otherwise
            empty. Not used for files that this project wrote.

    Raises:
        UserError: If the file is missing or damaged, contains several networks, or its weight
            family is unknown or differs from ``family``.
    """
    check_choice("head", head, HEADS)
    wanted = Wanted(prefix or "", checked_ema(ema))
    content = read_tensors(path, wanted=wanted)
    if network and OWN_METADATA not in content.metadata:
        found = only_network(content, network)
        return with_stated(_timm_source(found, network, family, wanted, head), stated)
    found = only_network(content)
    published = published_entries(path)
    if family is None and len({entry.family for entry in published}) == 1:
        family = published[0].family
    sources = []
    for candidate in _detect(found.file, family):
        source = _understand(found, candidate, wanted, ignore_head=head == "ignore")
        source = _as_published(_with_train_options(source, found.file), published)
        sources.append(with_stated(source, stated))
    first = sources[0]
    if family:
        return first
    alternatives = {other.family.name: _difference(first, other) for other in sources[1:]}
    if alternatives:
        pixels = {source.preprocessing for source in sources}
        logger.log(
            logging.WARNING if first.preprocessing and len(pixels) > 1 else logging.INFO,
            "The tensors of %s match several weight families. The family %s is assumed. The file "
            "could also be from %s. If so, set family= or MODEL.WEIGHTS_FAMILY.",
            path, first.family.name, _described(alternatives),
        )  # fmt: skip
    return replace(first, alternatives=alternatives)


def _timm_source(
    found: Network, network: str, family: str | None, wanted: Wanted, head: str
) -> Source:
    """Return the :class:`Source` for a file with the state dict of a timm network.

    Raises:
        UserError: If ``family`` is not timm's, or the file specifies a different network.
    """
    if family not in (None, "timm"):
        raise UserError(
            f"The weight family is {family!r}, but the model is {network}, which requires weights "
            "from timm. Omit family= (MODEL.WEIGHTS_FAMILY)."
        )
    file = found.file
    several = _has_others(file, wanted, network)
    stated = stated_network(file.path, file.metadata, network, file.timm, several=several)
    pixels = file.timm.preprocessing if file.timm else timm_preprocessing(stated)
    source = _understand(found, timm_family(network), wanted, ignore_head=head == "ignore")
    source = replace(source, preprocessing=pixels, network=network)
    return _with_train_options(source, file)


def _has_others(file: WeightFile, wanted: Wanted, timm: str = "") -> bool:
    """Return whether a file contains networks other than the one with the specified prefix."""
    reason = outside_prefix(wanted.prefix)
    return contains_network((name for name, why in file.dropped.items() if why == reason), timm)


def _with_train_options(source: Source, file: WeightFile) -> Source:
    """Return ``source`` with the preprocessing options that timm's ``train.py`` saved in the file.

    If the file contains no such options, ``source`` is returned unchanged.
    """
    if source.preprocessing is None or file.timm or OWN_METADATA in file.metadata:
        return source
    default = source.preprocessing
    if source.family.plain and source.architecture:
        default = FAMILIES["timm"].preprocessing(source.architecture) or default
    options = train_options(file.metadata, default)
    if options is None:
        return source
    stated = f"specify {', '.join(options)}" if options else "keep its defaults"
    return replace(
        source,
        preprocessing=replace(default, **options),
        recorded=source.recorded | options.keys(),
        notes=(*source.notes, f"the options of timm's train.py in the file {stated}"),
    )


def _as_published(source: Source, published: Iterable[Entry]) -> Source:
    """Return ``source`` with the preprocessing specified by the file's catalogue entry.

    If there is no entry for the file's weight family, ``source`` is returned unchanged.
    """
    entry = next((entry for entry in published if entry.family == source.family.name), None)
    if entry is None or source.preprocessing is None:
        return source
    return replace(
        source,
        preprocessing=replace(source.preprocessing, **entry.view),
        recorded=source.recorded | _GEOMETRY | _PIXELS,
        lookalikes=(),
    )


def with_stated(source: Source, stated: Iterable[tuple[str, Any]]) -> Source:
    """Replace layer options and preprocessing inferred from tensor names with the user's values.

    Values that the file itself or the catalogue specifies are not replaced.

    Args:
        source: Weight file, as returned by :func:`examine`.
        stated: Names of :class:`Geometry` and :class:`Preprocessing` fields, and their values.
    """
    notes = []
    for name, value in stated:
        part = "geometry" if name in _GEOMETRY else "preprocessing"
        fields_of = getattr(source, part)
        suggested = getattr(fields_of, name, None)
        if name in source.recorded or suggested is None or same_pixels(suggested, value):
            continue
        if value == "none" and not any("wideresnet18" in name for name in source.lookalikes):
            continue
        source = replace(source, **{part: replace(fields_of, **{name: value})})
        notes.append(
            f"{name} is {value}, as specified by the user, although the tensor names of the family "
            f"{source.family.name} suggest {suggested}"
        )
        logger.info("%s: %s.", source.path, notes[-1])
    return replace(source, notes=(*source.notes, *notes)) if notes else source


def _detect(file: WeightFile, family: str | None) -> list[Family]:
    found = [f for f in FAMILIES.values() if f.detect(file.tensors, file.metadata)]
    if family:
        if family not in FAMILIES:
            raise UserError(
                f"The weight family is {family!r}; expected one of: {', '.join(FAMILIES)}. "
                "Correct family= (--family, MODEL.WEIGHTS_FAMILY)."
            )
        # The tensor names in this project's files depend on the model, and are checked during
        # loading.
        if FAMILIES[family] not in found and family != "senet_transfer":
            taken = " or ".join(f.name for f in found) or "no known weight family"
            raise UserError(
                f"{file.path} does not belong to the weight family {family}. Its tensor names "
                f"match {taken}. Omit family= (MODEL.WEIGHTS_FAMILY), or use a "
                "different file."
            )
        return [FAMILIES[family]]
    if file.timm:
        found = [f for f in found if f.name in ("timm", "timm_legacy")]
    if not found:
        differs = unsupported_reason(file.tensors)
        hint = f" Its network is not supported: {differs}." if differs else ""
        raise UserError(
            f"{file.path} contains {len(file.tensors)} tensors, whose names (such as "
            f"{first_of(file.tensors, 4)}) match no known weight family.{hint} The known families "
            f"are {', '.join(FAMILIES)}."
        )
    return found


def _understand(found: Network, family: Family, wanted: Wanted, *, ignore_head: bool) -> Source:
    file, outside = found.file, found.outside
    checked = OWN_METADATA not in file.metadata and family.name in FAMILIES
    if checked and (differs := unsupported_reason(file.tensors)):
        raise UserError(
            f"{file.path}, detected as {family.name} ({family.title}), contains an unsupported "
            f"network: {differs}. Use weights of a supported network."
        )
    renamed = family.renamed(file.tensors)
    known = {name: ours for name, ours in renamed.items() if ours is not None}
    prefix = names.backbone_prefix(known.values())
    unknown = [*(name for name, ours in renamed.items() if ours is None), *outside]
    # timm's networks have no unknown names except those of another head.
    head = tuple(unknown) if family.name == TIMM_NETWORK else _head(unknown, outside, known)
    ignored = dict(file.dropped)
    if ignore_head:
        known, removed = _without_head(known, prefix)
        ignored |= dict.fromkeys([*removed, *head], "head: ignored as requested")
        unknown = [name for name in unknown if name not in head]
    tensors: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    for name, ours in known.items():
        ours = names.canonical(ours, prefix)
        if ours in tensors:
            raise UserError(
                f"{file.path}, detected as {family.name}, contains {ours} twice: as "
                f"{original[ours]} and as {name}. The file is damaged or was merged from several "
                "files. Download it again."
            )
        tensors[ours], original[ours] = reshaped(ours, file.tensors[name]), name
    convert_dtypes(tensors, file.path)
    notes = [
        *file.notes,
        *repair_counters(tensors),
        *fold_biases(tensors),
        *(expand_affine(tensors) if family.affine_norms else ()),
    ]
    architecture = Architecture.of(tensors)
    if architecture and architecture.network in family.background and architecture.classes == 1001:
        notes += drop_background(tensors)
        architecture = replace(architecture, classes=1000)
    geometry, preprocessing, recorded = _options_of(file, family, architecture)
    said = Statements()
    if OWN_METADATA not in file.metadata:
        said = statements_of(file.metadata, architecture, file.timm)
        notes += said.notes
        if said.contradiction and _has_others(file, wanted):
            notes.append(f"{said.contradiction}; it may describe another network in the file")
            said = Statements()
        geometry, preprocessing = _with_statements(file, family, said, geometry, preprocessing)
    if file.layers:
        notes += adjust_variances(file.layers, renamed, tensors, EPS)
    return Source(
        path=str(file.path),
        family=family,
        alternatives={},
        tensors=tensors,
        original=original,
        unknown=tuple(unknown),
        prefix=_joined(wanted.prefix, found.prefix),
        outside=outside,
        notes=tuple(notes),
        architecture=architecture,
        geometry=geometry,
        preprocessing=preprocessing,
        detector=any(names.is_outside_backbone(ours, prefix) for ours in known.values()),
        classes=class_names(file),
        network=own_network(file),
        ignored=ignored,
        head=() if ignore_head else head,
        recorded=recorded | said.recorded,
        lookalikes=() if said.confirmed or not family.plain else lookalikes(architecture),
    )


def _with_statements(
    file: WeightFile,
    family: Family,
    said: Statements,
    geometry: Geometry,
    preprocessing: Preprocessing | None,
) -> tuple[Geometry, Preprocessing | None]:
    """Replace the default layer options and preprocessing with those stored in the weight file.

    Raises:
        UserError: If the stored values contradict the tensors or describe an unsupported network.
    """
    if said.contradiction:
        raise UserError(
            f"{file.path}, detected as {family.name} ({family.title}): {said.contradiction}. The "
            "outputs would differ from those of the network that was trained. Use weights of a "
            "supported network. If this information in the file is wrong, save only the tensors: "
            'torch.save(checkpoint["state_dict"], "weights.pth").'
        )
    if said.wide:
        geometry = replace(geometry, stem_pool="none")
    if said.timm and preprocessing:
        preprocessing = said.timm.preprocessing
    elif said.preprocessing and preprocessing:
        pixels = said.preprocessing
        preprocessing = replace(
            preprocessing, format=pixels.format, mean=pixels.mean, std=pixels.std
        )
    return geometry, preprocessing


def _head(
    unknown: Collection[str], outside: Collection[str], known: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the names of unknown tensors that probably do not belong to the backbone.

    A tensor probably belongs to the backbone if the first component of its name, ignoring a number
    at the end, is the same as that of a known backbone tensor. For example, ``layer5.0.weight``
    probably belongs to a backbone that contains ``layer4.0.weight``.
    """
    backbone = [name for name, ours in known.items() if not ours.startswith(names.CLASSIFIER)]
    # In mmpretrain's files, all names in the backbone have a prefix.
    prefix = "backbone." if all(name.startswith("backbone.") for name in backbone) else ""
    own = {_start(name, prefix) for name in backbone}
    surrounding = set(outside)
    return tuple(name for name in unknown if name in surrounding or _start(name, prefix) not in own)


def _start(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).partition(".")[0].rstrip("0123456789")


def _joined(*prefixes: str) -> str:
    """Join prefixes of tensor names, and add trailing dots where they are missing."""
    return "".join(f"{prefix.removesuffix('.')}." for prefix in prefixes if prefix)


def _without_head(known: Mapping[str, str], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Split the known tensor names into those inside and those outside the backbone."""
    kept, removed = {}, []
    for name, ours in known.items():
        if ours.startswith(names.CLASSIFIER) or names.is_outside_backbone(ours, prefix):
            removed.append(name)
        else:
            kept[name] = ours
    return kept, removed


def _options_of(
    file: WeightFile, family: Family, architecture: Architecture | None
) -> tuple[Geometry, Preprocessing | None, frozenset[str]]:
    """Return the layer options and preprocessing of a file, or the defaults of its weight family.

    Returns:
        The layer options, the preprocessing, and the names of the fields whose values are not
        defaults of the weight family.
    """
    if OWN_METADATA in file.metadata:
        geometry, preprocessing = own_options(file)
        return geometry, preprocessing, _GEOMETRY | _PIXELS
    if architecture is None:
        return Geometry(), None, frozenset()
    # Only residual networks have layer options that the tensor shapes do not determine.
    geometry = Geometry() if architecture.network else family.geometry(architecture)
    recorded: frozenset[str] = frozenset()
    if file.layers and not architecture.network:
        geometry = stated_geometry(file.path, file.layers, geometry)
        recorded = _GEOMETRY
    return geometry, family.preprocessing(architecture), recorded


def _described(alternatives: dict[str, str]) -> str:
    """Return a list of weight families and their differences, as text for a log message."""
    return " or ".join(
        f"{name} (with {difference})" if difference else name
        for name, difference in alternatives.items()
    )


def _difference(first: Source, other: Source) -> str:
    """Describe the layer options and preprocessing in which ``other`` differs from ``first``.

    The result is "" if there is no difference.
    """
    parts = []
    for name, value in vars(other.geometry).items():
        if value != getattr(first.geometry, name):
            parts.append(f"{name} {value}")
    theirs, ours = other.preprocessing, first.preprocessing
    if theirs and ours:
        for name, value in vars(theirs).items():
            if value != getattr(ours, name):
                parts.append(f"{name} {value}")
    elif theirs != ours:
        parts.append("other preprocessing")
    return ", ".join(parts)
