"""Matching of the tensors in a weight file with those of a model, and errors for mismatches."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.families.renaming import BACKBONE, CLASSIFIER
from senet_transfer.weights.mapping.source import Source
from senet_transfer.weights.mapping.target import Target

# Layers of Detectron2 detectors whose number of outputs depends on the number of classes.
_PREDICTORS = re.compile(
    r"roi_heads\.box_predictor(\.\d+)?\.(cls_score|bbox_pred)\.(weight|bias)"
    r"|roi_heads\.mask_head\.predictor\.(weight|bias)"
    r"|head\.cls_score\.(weight|bias)"
)

_NOT_WEIGHTS = (
    (re.compile(r"pixel_(mean|std)"), "it belongs to the config"),
    (re.compile(r".*anchor_generator\.cell_anchors\..*"), "it belongs to the config"),
)

_STAGE = re.compile(r"(res[3-5])\.")
_SHOWN = 6


@dataclass
class Match:
    """Result of matching a file with a model.

    Attributes:
        filled: Values from the file for the model's tensors, by tensor name in this project.
        initialised: Reasons why tensors of the model keep their initial values, by tensor name in
            this project.
        ignored: Reasons why tensors in the file are intentionally not used, by tensor name in the
            file.
        missing: Names of the model's tensors that are missing from the file but required.
        left_over: Names of unexpected tensors in the file, which are neither part of the model
            nor ignored.
        misfits: Descriptions of tensors whose shape or dtype differs from the model's.
    """

    filled: dict[str, Tensor] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Return True if no tensor is missing, unexpected, or different in shape or dtype."""
        return not (self.missing or self.left_over or self.misfits)


def match(source: Source, target: Target, *, exact: bool = False) -> Match:
    """Match the tensors in a file with those of a model by name, shape and dtype.

    The precision may differ, but a floating-point tensor never matches an integer tensor.

    Args:
        source: Weight file, as returned by :func:`~.source.examine`.
        target: Model to load the file into.
        exact: Whether the file must contain all weights of the model and no others, as when a run
            is resumed.
    """
    result = Match(left_over=list(source.unknown))
    for name, tensor in target.tensors.items():
        if name not in source.tensors:
            _not_in_file(result, source, target, name, exact)
        elif _same_kind(source.tensors[name], tensor):
            result.filled[name] = source.tensors[name]
        elif not exact and (reason := _other_classes(source, target, name)):
            result.initialised[name] = reason
        else:
            own = target.own_names[name]
            result.misfits.append(_misfit(own, source.tensors[name], tensor))
    for name, original in source.original.items():
        if name in source.tensors and name not in target.tensors:
            if reason := _why_ignored(source, target, name, exact):
                result.ignored[original] = reason
            else:
                result.left_over.append(original)
    return result


def _same_kind(found: Tensor, expected: Tensor) -> bool:
    return (
        found.shape == expected.shape and found.is_floating_point() == expected.is_floating_point()
    )


def _not_in_file(result: Match, source: Source, target: Target, name: str, exact: bool) -> None:
    classifier = name.startswith(CLASSIFIER)
    se = ".se." in name and source.architecture and not source.architecture.se_stages
    if name.endswith(".num_batches_tracked"):
        # Evaluation does not use this counter, and files from old versions or other frameworks lack
        # it.
        return
    if exact:
        result.missing.append(target.own_names[name])
    elif se:
        result.initialised[name] = "SE layers: the file has none"
    elif classifier and not any(other.startswith("linear.") for other in source.tensors):
        result.initialised[name] = "classifier: the file has none"
    elif name in target.outside and not source.detector:
        result.initialised[name] = "detector parts outside the backbone: the file has none"
    else:
        result.missing.append(target.own_names[name])


def _other_classes(source: Source, target: Target, name: str) -> str | None:
    """Return the reason for not loading a tensor whose size depends on the number of classes.

    The result is None if the number of classes does not explain the difference in shape or dtype.
    """
    found, expected = source.tensors[name], target.tensors[name]
    if not found.is_floating_point() or found.shape[1:] != expected.shape[1:]:
        return None
    if name.startswith("linear."):
        return f"classifier: {len(found)} classes in the file, {len(expected)} in the model"
    if name in target.outside and _PREDICTORS.fullmatch(name):
        return "predictors for a different number of classes"
    return None


def _misfit(name: str, found: Tensor, expected: Tensor) -> str:
    kinds = [str(t.dtype).removeprefix("torch.") for t in (found, expected)]
    if found.shape == expected.shape:
        return f"{name} ({kinds[0]} in the file, {kinds[1]} in the model)"
    shapes = [tuple(t.shape) for t in (found, expected)]
    return f"{name} ({shapes[0]} in the file, {shapes[1]} in the model)"


def _why_ignored(source: Source, target: Target, name: str, exact: bool) -> str | None:
    """Return the reason for ignoring a tensor in the file, or None if it must not be ignored."""
    for pattern, reason in _NOT_WEIGHTS:
        if pattern.fullmatch(name):
            return reason
    if name.endswith(".num_batches_tracked"):
        return "num_batches_tracked: frozen norms do not have it"
    if exact:
        return None
    if name in target.unused:
        return "the backbone does not need this part of the network"
    # A model whose last stage is res3, for example, ignores the file's res4 and res5.
    known_stage = _STAGE.match(name)
    if known_stage and not any(ours.startswith(known_stage[0]) for ours in target.tensors):
        return f"the backbone ends before {known_stage[1]}"
    if name.startswith(CLASSIFIER) and not any(n.startswith(CLASSIFIER) for n in target.tensors):
        return "classifier: the model has none"
    if source.detector and not target.outside and not name.startswith(("stem.", "res")):
        return "detector parts: the model is not a detector"
    return None


def check_match(result: Match, source: Source, target: Target) -> None:
    """Raise a UserError with a list of all differences if a file does not fit a model."""
    problems = []
    if source.architecture and target.architecture:
        problems = source.architecture.differences(target.architecture)
    wrong = [
        _listed(f"{len(result.missing)} missing from the file", result.missing),
        _listed(f"{len(result.left_over)} unexpected", result.left_over),
        _listed(f"{len(result.misfits)} with a different shape or dtype", result.misfits),
    ]
    if result.fits or not any(wrong):
        return
    lines = "\n".join(f"  {line}" for line in [*filter(None, wrong), *problems])
    start = f"{source.path}, detected as {source.detected_as}, "
    if classes := _classes(result, source, target):
        raise UserError(
            f"{classes}\n{start}does not fit the model. The model's weights are unchanged. The "
            f"file differs from the model as follows:\n{lines}"
        )
    if source.head and set(result.left_over) <= set(source.head) and not result.missing:
        classifier = ""
        if source.num_classes and set(result.left_over) <= set(source.outside):
            classifier = (
                f"To load the network with its classifier, set prefix='{shown(source.prefix)}' "
                f"(in a config, MODEL.WEIGHTS_PREFIX: {shown(source.prefix)}). "
            )
        raise UserError(
            f"{start}contains the model's backbone and other tensors, such as a head for "
            f"pretraining. {classifier}To load only the backbone, set head='ignore' "
            f"(in a config, MODEL.WEIGHTS_HEAD: ignore). The model's weights are unchanged. The "
            f"file differs from the model as follows:\n{lines}"
        )
    raise UserError(
        f"{start}does not fit the model. The model's weights are unchanged. The file differs from "
        f"the model as follows:\n{lines}\n{_remedy(result, source, target)}"
    )


def _remedy(result: Match, source: Source, target: Target) -> str:
    """Return a suggestion for the user, depending on which tensors differ."""
    # Misfits are described as "name (shapes)".
    misfits = [text.partition(" ")[0] for text in result.misfits]
    outside = {target.own_names[name] for name in target.outside}
    others = {theirs for ours, theirs in source.original.items() if not ours.startswith(BACKBONE)}
    heads_only = (
        source.detector
        and outside.issuperset([*result.missing, *misfits])
        and others.issuperset(result.left_over)
    )
    if heads_only and not (result.missing or result.left_over):
        return (
            "The detector in the file has a different number of classes. Evaluate it on data with "
            "the classes that it was trained on. To train it on other classes, omit --eval-only "
            "and --resume."
        )
    if heads_only:
        return (
            "Only the detector's parts outside the backbone differ. To train this model starting "
            "from the file's backbone, write the backbone to a new file with `senet convert "
            f"{source.path} backbone.pth --backbone`, and set MODEL.WEIGHTS to the new file."
        )
    return (
        "Use weights for this network, or build the network to which the weights in the file "
        "belong. If the detected weight family is wrong, set family= or MODEL.WEIGHTS_FAMILY."
    )


def _classes(result: Match, source: Source, target: Target) -> str:
    """Explain the mismatch if a file differs from the model only in the number of classes.

    Returns:
        Text for an error message, or "" if the file and the model do not differ or differ in any
        other way.
    """
    pair = [tensors.get("linear.weight") for tensors in (source.tensors, target.tensors)]
    only = result.misfits and not result.missing and not result.left_over
    if not only or any(weight is None or not weight.ndim for weight in pair):
        return ""
    if any(
        not misfit.startswith(target.own_names["linear.weight"][:-6]) for misfit in result.misfits
    ):
        return ""
    found, expected = (len(weight) for weight in pair if weight is not None)
    if found == expected:
        return ""
    return (
        f"The file {source.path} contains a classifier for {found} classes, but the model has "
        f"{expected} classes. Use data with the {found} classes of the file, or first train the "
        f"file's network on your data (MODEL.WEIGHTS {source.path} in a training run), which "
        "replaces the classifier."
    )


def _listed(what: str, items: Iterable[str]) -> str:
    names = first_of(items, _SHOWN)
    return f"{what}: {names}" if names else ""
