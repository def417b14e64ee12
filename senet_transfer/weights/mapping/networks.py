"""Search for networks under a prefix, in files from training scripts that store several parts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.families import detect
from senet_transfer.weights.families.registry import FAMILIES, Family
from senet_transfer.weights.formats.reader import OWN_METADATA, WeightFile

# Families whose detection functions accept tensor names with any prefix.
_BEHIND_PREFIXES = ("senet_transfer", "detectron2", "detectron2_torchvision")
_FAMILIES = [family for name, family in FAMILIES.items() if name not in _BEHIND_PREFIXES]
_own = detect.any_of(
    detect.own_of_another_kind,
    detect.having(
        r"(backbone\.(bottom_up\.)?)?stem\.(\d\.)?conv\d?\.(norm\.)?weight",
        r"(backbone\.(bottom_up\.)?|roi_heads\.)?res\d\.\d+\.\w+(\.\d)*\.weight",
    ),
)
# The tensor names of mmpretrain and many other projects begin with this prefix.
_BACKBONE = "backbone."
_MAX_DEPTH = 6
_MAX_TENSORS = 20_000
_SHOWN = 6


def only_network(file: WeightFile) -> tuple[WeightFile, tuple[str, ...]]:
    """Find the only network in a file, and remove the prefix from its tensor names.

    Returns:
        The file content with only the network's tensors, and the names of the tensors outside its
        prefix. If no network is found, the content is returned unchanged.

    Raises:
        UserError: If there are several networks. The message lists their prefixes.
    """
    if OWN_METADATA in file.metadata or len(file.tensors) > _MAX_TENSORS:
        return file, ()
    found = list(_networks(file.tensors, file.metadata))
    if len(found) > 1:
        raise UserError(
            f"{file.path} contains {len(found)} networks, whose tensor names have the prefixes "
            f"{first_of(map(shown, found), _SHOWN)}. Select one with prefix= "
            f"(MODEL.WEIGHTS_PREFIX), such as {shown(found[0])}"
        )
    prefix = found[0] if found else ""
    if not prefix:
        return file, ()
    note = f"the network's tensor names have the prefix {shown(prefix)}, which was removed"
    inside = {n.removeprefix(prefix): t for n, t in file.tensors.items() if n.startswith(prefix)}
    outside = tuple(name for name in file.tensors if not name.startswith(prefix))
    return replace(file, tensors=inside, notes=(*file.notes, note)), outside


def _networks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> Iterator[str]:
    """Yield the prefixes of all networks that the tensors contain, outer ones first."""
    if _own(tensors, {}):
        yield prefix
        return
    skipped = ""
    if family := _family(tensors, metadata):
        inner = _below(tensors, _BACKBONE)
        other = _family(inner, metadata) if _unknown(family, tensors) else None
        if other is None or _unknown(other, inner):
            yield prefix
            return
        yield prefix + _BACKBONE
        skipped = _BACKBONE
    if depth == _MAX_DEPTH:
        return
    children: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        start, dot, rest = name.partition(".")
        if dot and start + dot != skipped:
            children.setdefault(start + dot, {})[rest] = tensor
    for start, inside in children.items():
        yield from _networks(inside, metadata, prefix + start, depth + 1)


def _family(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Family | None:
    return next((family for family in _FAMILIES if family.detect(tensors, metadata)), None)


def _unknown(family: Family, tensors: Mapping[str, Tensor]) -> int:
    return sum(1 for ours in family.renamed(tensors.keys()).values() if ours is None)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
