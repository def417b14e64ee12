"""Loading of weight files into models, with a report that accounts for every tensor."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing, same_pixels
from senet_transfer.utils.text import first_of
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.hub.catalogue import locate_weights
from senet_transfer.weights.mapping.channels import adapt_channels
from senet_transfer.weights.mapping.match import check_match, match
from senet_transfer.weights.mapping.source import Source, examine
from senet_transfer.weights.mapping.target import Target, fill, target_of

logger = logging.getLogger(__name__)

_SHOWN = 12


@dataclass(frozen=True)
class LoadReport:
    """Report on loading a weight file into a model. ``str(report)`` is a short summary.

    Attributes:
        path: Path of the file.
        family: Name of the file's weight family, as specified by the user or detected.
        alternatives: Other weight families with the same tensor names and shapes, each with a
            description of how its layer options and preprocessing differ.
        loaded: Names of the loaded tensors in the model.
        initialised: Names of the model's tensors that keep their initial values, with the reasons.
        ignored: Names of the file's tensors that were not used, with the reasons.
        notes: Notes for the user, for example about converted tensors.
        lookalikes: Names of other projects' networks with the same tensor names and shapes but
            different outputs, if the file may contain one of these networks.
        geometry: Layer options of the file's network, such as the stride placement. Unknown options
            are None and were assumed to be the same as in the model.
        preprocessing: Preprocessing that the model expects after loading.
    """

    path: str
    family: str
    loaded: tuple[str, ...]
    initialised: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    alternatives: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    lookalikes: tuple[str, ...] = ()
    geometry: Geometry = Geometry()
    preprocessing: Preprocessing = Preprocessing()

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded, family {self.family}"]
        if self.alternatives:
            lines.append(f"  could also be of the family {', '.join(self.alternatives)}")
        if self.lookalikes:
            lines.append(
                f"  has the same tensors as {' and '.join(self.lookalikes)}, whose outputs differ; "
                "make sure that the file is not for one of them"
            )
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


def load_weights(
    model: nn.Module,
    path: str | Path,
    family: str | None = None,
    *,
    prefix: str | None = None,
    ema: bool | str | None = None,
    head: str = "strict",
) -> LoadReport:
    """Load a weight file of any known weight family into a model.

    Every tensor of the backbone is loaded, including norm statistics, and every tensor in the file
    is used. The report lists the exceptions: a classifier or detector predictors for a different
    number of classes, SE layers if the file has none, and detector parts that a backbone file does
    not contain. The backbone's ``preprocessing`` attribute is set to the preprocessing that the
    file's network expects. The file's network and the model must have the same stride placement and
    stem pool. To build a model that matches the file, pass ``weights`` to ``create_backbone`` or
    ``create_classifier``, or use a config.

    Args:
        model: Backbone, classifier, or Detectron2 detector with one of this project's backbones.
        path: Path of the file, a name from ``list_catalogue()``, or a repository of the Hugging
            Face Hub such as "hf-hub:owner/name".
        family: Weight family of the file, one of ``FAMILIES``. Required only if several families
            use the same tensor names.
        prefix: Prefix of the network's tensor names in a file with several networks, such as
            "encoder_q." or "teacher.". The other tensors are ignored.
        ema: Whether to load the averaged (EMA) weights if a checkpoint contains both averaged and
            non-averaged weights. With None or "auto", the convention of the project that saved the
            file applies. The report specifies which weights were loaded.
        head: "strict", or "ignore" to load only the backbone, without the file's classifier or
            projection head.

    Returns:
        A report on the loaded tensors, which is also logged.

    Raises:
        UserError: If the file is missing or damaged, its weight family is unknown, or it does not
            fit the model. The model is then left unchanged.
    """
    path, family = locate_weights(path, family)
    network = target_of(model).network
    source = examine(path, family, prefix=prefix, ema=ema, head=head, network=network)
    return load_source(model, source)


def load_source(model: nn.Module, source: Source, *, exact: bool = False) -> LoadReport:
    """Load the content of a weight file into a model; see :func:`load_weights`.

    Args:
        model: Backbone, classifier or detector.
        source: Content of the weight file, as returned by :func:`~.mapping.source.examine`.
        exact: Whether all tensors must match, including those that depend on the number of classes.

    Raises:
        UserError: If the file does not fit the model. The model is then left unchanged.
    """
    target = target_of(model)
    if not exact:
        source = adapt_channels(source, target)
    result = match(source, target, exact=exact)
    check_match(result, source, target)
    _check_norms(source, target)
    _check_geometry(source, target)
    fill(target, result.filled)
    own = target.backbone_preprocessing()
    preprocessing = source.preprocessing or own
    if pixels := target.pixels():
        # The model was built from a config, which specifies how images are read, resized and
        # cropped.
        preprocessing = replace(
            own, format=pixels.format, mean=preprocessing.mean, std=preprocessing.std
        )
    target.backbone.preprocessing = preprocessing
    notes = list(source.notes)
    if source.preprocessing is None and not source.geometry.options():
        notes.append(
            "the file specifies neither layer options, such as strides, nor preprocessing; the "
            "model's values are kept"
        )
    report = LoadReport(
        path=source.path,
        family=source.family.name,
        loaded=tuple(target.own_names[name] for name in result.filled),
        initialised={target.own_names[name]: why for name, why in result.initialised.items()},
        ignored={**source.ignored, **result.ignored},
        alternatives=source.alternatives,
        notes=tuple(notes),
        lookalikes=source.lookalikes,
        geometry=source.geometry,
        preprocessing=preprocessing,
    )
    target.backbone.weights_source = {"family": source.family.name, "file": Path(source.path).name}
    logger.info("%s", report)
    return report


def _check_norms(source: Source, target: Target) -> None:
    if source.family.affine_norms and not target.has_frozen_norms:
        raise UserError(
            f"{source.path}, detected as {source.detected_as}, contains batch norms without "
            "running statistics (they are folded into the weights and biases); expected running "
            "statistics, because the model's norms are not frozen. Build the model with "
            "norm='FrozenBN' (MODEL.RESNETS.NORM), or use weights with running statistics."
        )


def _check_geometry(source: Source, target: Target) -> None:
    """Raise a UserError if the file's layer options or preprocessing differ from the model's."""
    found = source.geometry.contradictions(target.geometry)
    pixels = target.pixels()
    if pixels and source.preprocessing:
        found += pixel_contradictions(source.preprocessing, pixels)
    if found:
        lines = "\n".join(f"  {line}" for line in found)
        raise UserError(
            f"{source.path}, detected as {source.detected_as}, has the same tensor shapes as the "
            f"model, but the weights were trained with different settings:\n{lines}\nBuild the "
            "model with the file's layer options and preprocessing (weights= in create_backbone "
            "and create_classifier, MODEL.WEIGHTS in a config). If the detected weight family is "
            "wrong, set family= or MODEL.WEIGHTS_FAMILY."
        )


def pixel_contradictions(file: Preprocessing, model: Preprocessing) -> list[str]:
    """Return messages about differences in channel order, mean or std between file and model."""
    found = []
    for name, key in (
        ("format", "INPUT.FORMAT"),
        ("mean", "MODEL.PIXEL_MEAN"),
        ("std", "MODEL.PIXEL_STD"),
    ):
        theirs, built = getattr(file, name), getattr(model, name)
        # A network for colour images can process grayscale images as three equal channels.
        if name == "format" and built == "L":
            continue
        if not same_pixels(theirs, built):
            found.append(
                f"The preprocessing differs: {name} is {theirs} for the file's network and {built} "
                f"for the model ({key})."
            )
    return found
