"""Loading weights so that every tensor is accounted for, or not at all."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.text import first_of
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.hub.catalogue import locate_weights
from senet_transfer.weights.mapping.match import check_match, match
from senet_transfer.weights.mapping.source import Source, examine
from senet_transfer.weights.mapping.target import Target, fill, target_of

logger = logging.getLogger(__name__)

_SHOWN = 12


@dataclass(frozen=True)
class LoadReport:
    """What was loaded. Printed, it says it in a few lines.

    Attributes:
        path: the file.
        family: the name of the family that it was taken for.
        alternatives: other families with the same names and shapes, and what would differ.
        loaded: the model's tensors that were filled from the file, by their names in the model.
        initialised: those that keep their initial values, each with the reason.
        ignored: the file's tensors that went nowhere, by their names in the file, likewise.
        notes: what else was done, in words.
        geometry: of the file's network; what is not known of it was taken to be the model's.
        preprocessing: what the model now expects of an image.
    """

    path: str
    family: str
    loaded: tuple[str, ...]
    initialised: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    alternatives: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    geometry: Geometry = Geometry()
    preprocessing: Preprocessing = Preprocessing()

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded, family {self.family}"]
        if self.alternatives:
            lines.append(f"  could also be: {', '.join(self.alternatives)}")
        lines += _by_reason("initialised", self.initialised)
        lines += _by_reason("ignored", self.ignored)
        lines += [f"  note: {note}" for note in self.notes]
        pixels = self.preprocessing
        lines.append(
            f"  expects {pixels.format}, mean {pixels.mean}, std {pixels.std}"
            + "".join(f", {name} {value}" for name, value in self.geometry.options().items())
        )
        return "\n".join(lines)


def _by_reason(what: str, reasons: dict[str, str]) -> list[str]:
    lines = []
    for reason, count in Counter(reasons.values()).items():
        names = [name for name, why in reasons.items() if why == reason]
        lines.append(f"  {what}, {count} ({reason}): {first_of(names, _SHOWN)}")
    return lines


def load_weights(model: nn.Module, path: str | Path, family: str | None = None) -> LoadReport:
    """Fill a model from a weight file of any known family, completely or not at all.

    Every tensor of the backbone is filled, including the norms' statistics, and every tensor of the
    file is used, except for those that the report names: a classifier or a detector's predictors
    with another number of classes, SE layers if the file is of a plain network, parts of a detector
    that a backbone's file does not have. The file's geometry must be the model's;
    ``create_backbone`` and ``create_classifier`` with ``weights``, and a config, take it from the
    file instead.

    Args:
        model: a backbone, a classifier or a Detectron2 detector on one of this project's backbones.
        path: the file, or a name of ``list_catalogue()``.
        family: its family, where the names in it are those of several; see ``FAMILIES``.

    Returns:
        What was loaded; it is logged too. The backbone's ``preprocessing`` is that of the file.

    Raises:
        UserError: the file is missing, damaged or of no known family, or does not fit; the model
            is then as it was.
    """
    return load_source(model, examine(*locate_weights(path, family)))


def load_source(model: nn.Module, source: Source, *, exact: bool = False) -> LoadReport:
    """Fills a model from an examined file; see :func:`load_weights`.

    Args:
        model: as there.
        source: the file.
        exact: whether it must be of this very model, down to the number of classes.
    """
    target = target_of(model)
    result = match(source, target, exact=exact)
    check_match(result, source, target)
    _check_norms(source, target)
    _check_geometry(source, target)
    fill(target, result.filled)
    own = target.backbone_preprocessing()
    preprocessing = source.preprocessing or own
    if target.pixels():
        # Built from a config, which says the view, too: the run's is not that of the file.
        preprocessing = replace(
            preprocessing, resize=own.resize, crop=own.crop, interpolation=own.interpolation
        )
    target.backbone.preprocessing = preprocessing
    notes = list(source.notes)
    if source.preprocessing is None and not source.geometry.options():
        notes.append("the file doesn't state geometry and preprocessing: the model's own are kept")
    report = LoadReport(
        path=source.path,
        family=source.family.name,
        loaded=tuple(target.own_names[name] for name in result.filled),
        initialised={target.own_names[name]: why for name, why in result.initialised.items()},
        ignored=result.ignored,
        alternatives=source.alternatives,
        notes=tuple(notes),
        geometry=source.geometry,
        preprocessing=preprocessing,
    )
    target.backbone.weights_source = {"family": source.family.name, "file": Path(source.path).name}
    logger.info("%s", report)
    return report


def _check_norms(source: Source, target: Target) -> None:
    if source.family.affine_norms and not target.has_frozen_norms:
        raise UserError(
            f"{source.path}, taken for {source.taken_for}, has norms without statistics, which "
            "can't be trained further. Build the model with norm='FrozenBN' (MODEL.RESNETS.NORM), "
            "or take weights that have their statistics."
        )


def _check_geometry(source: Source, target: Target) -> None:
    """Raises UserError where the file's network is not the model's, which no shape shows."""
    found = source.geometry.contradictions(target.geometry)
    pixels = target.pixels()
    if pixels and source.preprocessing:
        found += pixel_contradictions(source.preprocessing, pixels)
    if found:
        lines = "\n".join(f"  {line}" for line in found)
        raise UserError(
            f"{source.path}, taken for {source.taken_for}, fits the model in every shape and would "
            f"still compute something else:\n{lines}\nBuild the model with the file's values "
            "(create_backbone and create_classifier do with weights=, a config does with "
            "MODEL.WEIGHTS), or, if it was taken for the wrong family, say which with family= or "
            "MODEL.WEIGHTS_FAMILY."
        )


def pixel_contradictions(file: Preprocessing, model: Preprocessing) -> list[str]:
    """How channel order, mean and std of a file and of a model differ, in sentences."""
    found = []
    for name, key in (
        ("format", "INPUT.FORMAT"),
        ("mean", "MODEL.PIXEL_MEAN"),
        ("std", "MODEL.PIXEL_STD"),
    ):
        theirs, built = getattr(file, name), getattr(model, name)
        if not same_pixels(theirs, built):
            found.append(
                f"Images are prepared differently: {name} {theirs} for the file's network, {built} "
                f"for the model ({key})."
            )
    return found


def same_pixels(first: str | Sequence[float], second: str | Sequence[float]) -> bool:
    """Whether two channel orders, means or stds are the same, up to the last printed digit."""
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    return len(first) == len(second) and all(
        abs(a - b) < 0.005 for a, b in zip(first, second, strict=True)
    )
