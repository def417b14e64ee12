"""Which tensor of a file goes where in a model, and what is wrong where the two don't fit."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of
from senet_transfer.weights.families.renaming import CLASSIFIER
from senet_transfer.weights.mapping.source import Source
from senet_transfer.weights.mapping.target import Target

# The parts of Detectron2's detectors whose outputs are counted by class.
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
    """What becomes of each tensor.

    Attributes:
        filled: the model's tensors that the file fills.
        initialised: those that keep their initial values, each with the reason.
        ignored: tensors of the file that go nowhere, by the file's names, each with the reason.
        missing: tensors of the model, by its own names, that the file should have and has not.
        left_over: tensors of the file, by its names, that nobody asked for.
        misfits: tensors of both that differ in shape or kind, in words.
    """

    filled: dict[str, Tensor] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.missing or self.left_over or self.misfits)


def match(source: Source, target: Target, *, exact: bool = False) -> Match:
    """Compares a file with a model, tensor by tensor.

    Args:
        source: the file.
        target: the model.
        exact: whether the file is to be of this very model, so that nothing may stay initialised
            or be ignored: a run that is taken up again.
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
        # A counter that evaluation does not use; old files and other frameworks have none.
        return
    if exact:
        result.missing.append(target.own_names[name])
    elif se:
        result.initialised[name] = "SE layers: the file is of a plain network"
    elif classifier and not any(other.startswith("linear.") for other in source.tensors):
        result.initialised[name] = "the classifier: the file has none"
    elif name in target.beside and not source.detector:
        result.initialised[name] = "parts around the backbone: not in the file"
    else:
        result.missing.append(target.own_names[name])


def _other_classes(source: Source, target: Target, name: str) -> str | None:
    """Why a tensor whose shape differs may stay initialised; None where it may not."""
    found, expected = source.tensors[name], target.tensors[name]
    if not found.is_floating_point() or found.shape[1:] != expected.shape[1:]:
        return None
    if name.startswith("linear."):
        return f"the classifier: {len(found)} classes in the file, {len(expected)} in the model"
    if name in target.beside and _PREDICTORS.fullmatch(name):
        return "predictors of another class count"
    return None


def _misfit(name: str, found: Tensor, expected: Tensor) -> str:
    kinds = [str(t.dtype).removeprefix("torch.") for t in (found, expected)]
    if found.shape == expected.shape:
        return f"{name} ({kinds[0]} in the file, {kinds[1]} in the model)"
    shapes = [tuple(t.shape) for t in (found, expected)]
    return f"{name} ({shapes[0]} in the file, {shapes[1]} in the model)"


def _why_ignored(source: Source, target: Target, name: str, exact: bool) -> str | None:
    """Why a tensor of the file may go nowhere; None where it may not."""
    for pattern, reason in _NOT_WEIGHTS:
        if pattern.fullmatch(name):
            return reason
    if name.endswith(".num_batches_tracked"):
        return "a counter that frozen norms don't keep"
    if exact:
        return None
    # A backbone's names start so; everything else in a detector's file is around it.
    known_stage = _STAGE.match(name)
    if known_stage and not any(ours.startswith(known_stage[0]) for ours in target.tensors):
        return f"the backbone ends before {known_stage[1]}"
    if name.startswith(CLASSIFIER) and not any(n.startswith(CLASSIFIER) for n in target.tensors):
        return "the classifier: the model has none"
    if source.detector and not target.beside and not name.startswith(("stem.", "res")):
        return "parts of a detector: the model is none"
    return None


def check_match(result: Match, source: Source, target: Target) -> None:
    """Raises UserError where file and model don't fit, with all that is wrong."""
    problems = []
    if source.architecture and target.architecture:
        problems = source.architecture.differences(target.architecture)
    wrong = [
        _listed(f"{len(result.missing)} missing in the file", result.missing),
        _listed(f"{len(result.left_over)} left over", result.left_over),
        _listed(f"{len(result.misfits)} of another shape", result.misfits),
    ]
    if result.fits or not any(wrong):
        return
    lines = "\n".join(f"  {line}" for line in [*filter(None, wrong), *problems])
    raise UserError(
        f"{source.path}, taken for {source.taken_for}, does not fit the model, which is left as "
        f"it was:\n{lines}\nTake a file of this network, the network of this file, or, if it was "
        "taken for the wrong family, say which with family= or MODEL.WEIGHTS_FAMILY."
    )


def _listed(what: str, items: Iterable[str]) -> str:
    names = first_of(items, _SHOWN)
    return f"{what}: {names}" if names else ""
