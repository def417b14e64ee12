"""A weight file, understood: its family, its tensors under this project's names, its geometry."""

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
from senet_transfer.utils.text import first_of
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
    """A weight file, understood.

    Attributes:
        path: the file.
        family: what it was taken for.
        alternatives: other families that have the same names and shapes, and what would differ.
        tensors: by this project's name; the backbone's have no prefix, whatever stands around it.
        original: the file's own name of each.
        unknown: the file's names that the family does not have.
        notes: what was done to tensors on the way, in words.
        architecture: of the backbone; None where it is no network of this project.
        geometry: of the backbone, as far as it is known.
        preprocessing: what the network expects of an image; None where it is not known.
        detector: whether there are parts around the backbone besides a classifier.
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

    @property
    def taken_for(self) -> str:
        """The family in words."""
        return f"{self.family.name} ({self.family.title})"

    def options(self) -> dict[str, Any]:
        """Return what is known of the network, by the names of ``create_backbone``'s overrides."""
        options = self.geometry.options()
        arch = self.architecture
        if arch and arch.se_stages:
            options |= {"se_bias": arch.se_bias, "se_stages": arch.se_stages}
            if arch.se_ratio:
                options |= {"se_ratio": arch.se_ratio, "se_divisor": arch.se_divisor}
        return options


@once_per_file
def examine(path: str | Path, family: str | None = None) -> Source:
    """Read a weight file and find out what it is.

    Args:
        path: the file.
        family: the name of its family, where the names in it are those of several; None: found
            out, or the stated default, and the alternatives are logged.

    Raises:
        UserError: no such file, a damaged one, one of no family that is known here, or of another
            than ``family``.
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
            "%s is taken for %s. Files of %s have the same names and shapes%s; "
            "family= or MODEL.WEIGHTS_FAMILY says which it is.",
            path, first.family.name, name, f" and differ in {difference}" if difference else "",
        )  # fmt: skip
    return replace(first, alternatives=alternatives)


def _detect(file: WeightFile, family: str | None) -> list[Family]:
    found = [f for f in FAMILIES.values() if f.detect(file.tensors, file.metadata)]
    if family:
        if family not in FAMILIES:
            raise UserError(f"There is no weight family {family!r}. Known: {', '.join(FAMILIES)}.")
        # Under this project's own names anything can be saved, and loading tells whether it fits.
        if FAMILIES[family] not in found and family != "senet_transfer":
            taken = " or ".join(f.name for f in found) or "none that is known here"
            raise UserError(
                f"{file.path} is no file of the family {family}: by its names it is of {taken}. "
                "Leave the family out, or give the file that was meant."
            )
        return [FAMILIES[family]]
    if not found:
        differs = what_differs(file.tensors)
        hint = f" What differs from the networks here: {differs}." if differs else ""
        raise UserError(
            f"{file.path} holds {len(file.tensors)} tensors under names of no family that is known "
            f"here ({first_of(file.tensors, 4)}).{hint} Known: {', '.join(FAMILIES)}."
        )
    return found


def _understand(file: WeightFile, family: Family) -> Source:
    if differs := what_differs(file.tensors):
        raise UserError(
            f"{file.path} was taken for {family.name} ({family.title}), and is of a network that "
            f"is not in this project: {differs}. Take the weights of the plain variant."
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
                f"{file.path}, taken for {family.name}, has {ours} twice: as {original[ours]} and "
                f"as {name}. It is damaged, or put together from several files."
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
        detector=any(names.is_beside_backbone(ours, prefix) for ours in known.values()),
    )


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    """The layers of SE as linear ones; other projects have them as 1x1 convolutions."""
    if ".se.fc" in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor


def _fold_biases(tensors: dict[str, Tensor]) -> list[str]:
    """Moves a convolution's bias into the mean of the norm after it, which is the same network."""
    notes = []
    for name in [name for name in tensors if name.endswith(".bias")]:
        mean = f"{name.removesuffix('.bias')}.norm.running_mean"
        if mean in tensors and tensors[mean].shape == tensors[name].shape:
            tensors[mean] = tensors[mean] - tensors.pop(name)
            notes.append(f"{name} is folded into {mean}")
    return notes


def _expand_affine(tensors: dict[str, Tensor]) -> list[str]:
    """Gives norms that are a weight and a bias the statistics that change nothing."""
    for name in [name for name in tensors if name.endswith(".norm.weight")]:
        norm, weight = name.removesuffix(".weight"), tensors[name]
        tensors[f"{norm}.running_mean"] = torch.zeros_like(weight)
        tensors[f"{norm}.running_var"] = torch.ones_like(weight) - _EPS
    if "stem.conv1.bias" in tensors and not tensors["stem.conv1.bias"].any():
        del tensors["stem.conv1.bias"]
        return ["stem.conv1.bias is zero and left out"]
    return []


def _drop_background(tensors: dict[str, Tensor]) -> list[str]:
    for name in ("linear.weight", "linear.bias"):
        if name in tensors:
            tensors[name] = tensors[name][1:]
    return ["the first of the classifier's 1001 classes, the background, is left out"]


def _computes(
    file: WeightFile, family: Family, architecture: Architecture | None
) -> tuple[Geometry, Preprocessing | None]:
    """The geometry and the preprocessing: the file's own word, or else its family's record."""
    if OWN_METADATA in file.metadata:
        return _own_word(file)
    if architecture is None:
        return Geometry(), None
    # No other network here has a choice that its shapes leave open.
    geometry = Geometry() if architecture.network else family.geometry(architecture)
    if file.layers and not architecture.network:
        geometry = stated_geometry(file.path, file.layers, geometry)
    return geometry, family.preprocessing(architecture)


def _own_word(file: WeightFile) -> tuple[Geometry, Preprocessing | None]:
    word = file.metadata[OWN_METADATA]
    if not isinstance(word, Mapping):
        raise UserError(
            f"{file.path}: its entry {OWN_METADATA!r} is no dict, so it is not as this project "
            "writes it. Save the model again with senet_transfer.save_weights."
        )
    geometry, pixels = word.get("geometry"), word.get("preprocessing")
    return (
        Geometry.from_dict(geometry) if isinstance(geometry, Mapping) else Geometry(),
        _preprocessing(file, pixels) if isinstance(pixels, Mapping) else None,
    )


def _preprocessing(file: WeightFile, values: Mapping[str, Any]) -> Preprocessing:
    known = {f.name: values[f.name] for f in fields(Preprocessing) if f.name in values}
    try:
        for name in ("mean", "std"):
            if name in known:
                first, second, third = (float(value) for value in known[name])
                known[name] = (first, second, third)
        found = Preprocessing(**known)
        if found.format not in ("RGB", "BGR") or found.interpolation not in ("bilinear", "bicubic"):
            raise ValueError("an unknown order of channels or interpolation")
        if not all(isinstance(side, int) and side > 0 for side in (found.resize, found.crop)):
            raise ValueError("a size that is none")
        return found
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file.path} states a preprocessing that is none: {dict(values)}. Its metadata is "
            "damaged; save the model again with senet_transfer.save_weights."
        ) from error


def _difference(first: Source, other: Source) -> str:
    """How an alternative's network or preprocessing differs, in words; empty where they agree."""
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
