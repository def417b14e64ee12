"""Examination of weight files: family, renamed tensors, architecture and geometry."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.read_once import once_per_file
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.families import renaming as names
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.caffe_geometry import adjust_variances, stated_geometry
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.families.registry import FAMILIES, Family, what_differs
from senet_transfer.weights.formats.reader import OWN_METADATA, WeightFile, read_tensors

logger = logging.getLogger(__name__)

_EPS = 1e-5


@dataclass(frozen=True)
class Source:
    """Examined weight file.

    Attributes:
        path: Path of the file.
        family: Family, given or detected.
        alternatives: Other families with the same tensor names and shapes, and their differences.
        tensors: Tensors by this project's names. Backbone names have no prefix, even in a
            classifier or a detector.
        original: Name of each tensor in the file, by this project's name.
        unknown: Tensor names in the file that are not part of the family.
        notes: Changes made to the tensors, as sentences.
        architecture: Backbone architecture; None if it is unknown.
        geometry: Backbone geometry, as far as it is known.
        preprocessing: Preprocessing that the network expects; None if it is unknown.
        detector: Whether the file has tensors outside the backbone and the classifier.
        classes: Class names in the order of the network's outputs; empty if they are unknown.
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
    classes: tuple[str, ...] = ()

    @property
    def detected_as(self) -> str:
        """Return the family's name and title, for messages."""
        return f"{self.family.name} ({self.family.title})"

    def options(self) -> dict[str, Any]:
        """Return the known network options as keyword arguments for ``create_backbone``."""
        options = self.geometry.options()
        arch = self.architecture
        if arch and arch.se_stages:
            options |= {"se_bias": arch.se_bias, "se_stages": arch.se_stages}
            if arch.se_ratio:
                options |= {"se_ratio": arch.se_ratio, "se_divisor": arch.se_divisor}
        return options

    def backbone_only(self) -> "Source":
        """Return this file without the tensors outside the backbone."""
        tensors = {n: tensor for n, tensor in self.tensors.items() if n.startswith(names.BACKBONE)}
        return replace(
            self,
            tensors=tensors,
            original={name: name for name in tensors},
            unknown=(),
            detector=False,
        )


@once_per_file
def examine(path: str | Path, family: str | None = None) -> Source:
    """Read a weight file and detect its family, architecture, geometry and preprocessing.

    Args:
        path: Path of the file.
        family: Name of the file's family. If None, the family is detected. If several families
            match, the first one in ``FAMILIES`` is used, and the others are logged.

    Raises:
        UserError: If the file is missing or damaged, or its family is unknown or differs from
            ``family``.
    """
    file = read_tensors(path)
    found = _detect(file, family)
    sources = [_understand(file, candidate) for candidate in found]
    first = sources[0]
    if family:
        return first
    alternatives = {other.family.name: _difference(first, other) for other in sources[1:]}
    for name, difference in alternatives.items():
        logger.info(
            "%s was detected as %s. Files of the family %s have the same tensor names and "
            "shapes%s. If the file belongs to that family, set family= or MODEL.WEIGHTS_FAMILY.",
            path, first.family.name, name, f", but differ in {difference}" if difference else "",
        )  # fmt: skip
    return replace(first, alternatives=alternatives)


def _detect(file: WeightFile, family: str | None) -> list[Family]:
    found = [f for f in FAMILIES.values() if f.detect(file.tensors, file.metadata)]
    if family:
        if family not in FAMILIES:
            raise UserError(
                f"The weight family is {family!r}; expected one of: {', '.join(FAMILIES)}."
            )
        # The tensor names in this project's files depend on the model, and are checked during
        # loading.
        if FAMILIES[family] not in found and family != "senet_transfer":
            taken = " or ".join(f.name for f in found) or "no known family"
            raise UserError(
                f"{file.path} does not belong to the family {family}. Its tensor names match "
                f"{taken}. Omit the family, or use a different file."
            )
        return [FAMILIES[family]]
    if not found:
        differs = what_differs(file.tensors)
        hint = f" Its network is not supported: {differs}." if differs else ""
        raise UserError(
            f"{file.path} contains {len(file.tensors)} tensors, whose names (such as "
            f"{first_of(file.tensors, 4)}) match no known family.{hint} The known families are "
            f"{', '.join(FAMILIES)}."
        )
    return found


def _understand(file: WeightFile, family: Family) -> Source:
    if differs := what_differs(file.tensors):
        raise UserError(
            f"{file.path}, detected as {family.name} ({family.title}), contains an unsupported "
            f"network: {differs}. Use weights of a supported network."
        )
    renamed = family.renamed(file.tensors)
    known = {name: ours for name, ours in renamed.items() if ours is not None}
    prefix = names.backbone_prefix(known.values())
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
        tensors[ours], original[ours] = _reshaped(ours, file.tensors[name]), name
    notes = [*_fold_biases(tensors), *(_expand_affine(tensors) if family.affine_norms else ())]
    architecture = Architecture.of(tensors)
    if architecture and architecture.network in family.background and architecture.classes == 1001:
        notes += _drop_background(tensors)
        architecture = replace(architecture, classes=1000)
    geometry, preprocessing = _computes(file, family, architecture)
    if file.layers:
        notes += adjust_variances(file.layers, renamed, tensors, _EPS)
    return Source(
        path=str(file.path),
        family=family,
        alternatives={},
        tensors=tensors,
        original=original,
        unknown=tuple(name for name, ours in renamed.items() if ours is None),
        notes=tuple(notes),
        architecture=architecture,
        geometry=geometry,
        preprocessing=preprocessing,
        detector=any(names.is_outside_backbone(ours, prefix) for ours in known.values()),
        classes=_class_names(file),
    )


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    """Convert an SE layer's weight from a 1x1 convolution to a linear layer."""
    if ".se.fc" in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor


def _fold_biases(tensors: dict[str, Tensor]) -> list[str]:
    """Fold biases into the running means of the norms that follow them, which is equivalent."""
    notes = []
    for name in [name for name in tensors if name.endswith(".bias")]:
        mean = f"{name.removesuffix('.bias')}.norm.running_mean"
        if mean in tensors and tensors[mean].shape == tensors[name].shape:
            tensors[mean] = tensors[mean] - tensors.pop(name)
            notes.append(f"{name} was folded into {mean}")
    return notes


def _expand_affine(tensors: dict[str, Tensor]) -> list[str]:
    """Add identity statistics to norms that have only a weight and a bias."""
    for name in [name for name in tensors if name.endswith(".norm.weight")]:
        norm, weight = name.removesuffix(".weight"), tensors[name]
        tensors[f"{norm}.running_mean"] = torch.zeros_like(weight)
        tensors[f"{norm}.running_var"] = torch.ones_like(weight) - _EPS
    if "stem.conv1.bias" in tensors and not tensors["stem.conv1.bias"].any():
        del tensors["stem.conv1.bias"]
        return ["stem.conv1.bias is zero and was dropped"]
    return []


def _drop_background(tensors: dict[str, Tensor]) -> list[str]:
    for name in ("linear.weight", "linear.bias"):
        if name in tensors:
            tensors[name] = tensors[name][1:]
    return ["the background class, the first of the classifier's 1001 classes, was dropped"]


def _computes(
    file: WeightFile, family: Family, architecture: Architecture | None
) -> tuple[Geometry, Preprocessing | None]:
    """Return the geometry and preprocessing from the file's metadata, or else from its family."""
    if OWN_METADATA in file.metadata:
        return _own_word(file)
    if architecture is None:
        return Geometry(), None
    # Only residual networks have geometry options that the tensor shapes do not determine.
    geometry = Geometry() if architecture.network else family.geometry(architecture)
    if file.layers and not architecture.network:
        geometry = stated_geometry(file.path, file.layers, geometry)
    return geometry, family.preprocessing(architecture)


def _own_word(file: WeightFile) -> tuple[Geometry, Preprocessing | None]:
    word = file.metadata[OWN_METADATA]
    if not isinstance(word, Mapping):
        raise UserError(
            f"{file.path}: The entry {OWN_METADATA!r} is a {type(word).__name__}; expected a dict. "
            "Save the model again with senet_transfer.save_weights."
        )
    geometry, pixels = word.get("geometry"), word.get("preprocessing")
    return (
        Geometry.from_dict(geometry) if isinstance(geometry, Mapping) else Geometry(),
        _preprocessing(file, pixels) if isinstance(pixels, Mapping) else None,
    )


def _class_names(file: WeightFile) -> tuple[str, ...]:
    word = file.metadata.get(OWN_METADATA)
    names = word.get("classes", ()) if isinstance(word, Mapping) else ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{file.path} has invalid class names in its metadata: {shown(names)}. Expected a list "
            "of text. Save the model again with senet_transfer.save_weights."
        )
    return tuple(names)


# Numbers of values for the mean and std of each image format.
_CHANNELS = {"RGB": (3,), "BGR": (3,), "L": (1, 3)}


def _preprocessing(file: WeightFile, values: Mapping[str, Any]) -> Preprocessing:
    known = {f.name: values[f.name] for f in fields(Preprocessing) if f.name in values}
    try:
        for name in ("mean", "std"):
            if name in known:
                known[name] = tuple(float(value) for value in known[name])
        found = Preprocessing(**known)
        if found.format not in _CHANNELS or found.interpolation not in ("bilinear", "bicubic"):
            raise ValueError("unknown channel order or interpolation")
        if len(found.mean) not in _CHANNELS[found.format] or len(found.std) != len(found.mean):
            raise ValueError("wrong number of values for mean or std")
        if not all(isinstance(side, int) and side > 0 for side in (found.resize, found.crop)):
            raise ValueError("resize and crop must be positive integers")
        return found
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file.path} has invalid preprocessing in its metadata: {dict(values)} ({error}). "
            "Save the model again with senet_transfer.save_weights."
        ) from error


def _difference(first: Source, other: Source) -> str:
    """Describe how an alternative's geometry or preprocessing differs; return "" if it does not."""
    parts = []
    for name, value in vars(other.geometry).items():
        if value != getattr(first.geometry, name):
            parts.append(f"{name} ({value})")
    theirs, ours = other.preprocessing, first.preprocessing
    if theirs and ours:
        for name, value in vars(theirs).items():
            if value != getattr(ours, name):
                parts.append(f"{name} ({value})")
    elif theirs != ours:
        parts.append("preprocessing")
    return ", ".join(parts)
