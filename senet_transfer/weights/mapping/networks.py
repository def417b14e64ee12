"""Search for networks in weight files by tensor-name prefixes, such as ``backbone.``."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.families import detect
from senet_transfer.weights.families.registry import FAMILIES, Family
from senet_transfer.weights.formats.reader import OWN_METADATA, WeightFile
from senet_transfer.weights.hub.timm_networks import first_convolution, tensor_names

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
_PARALLEL = re.compile(r"(?<=\.)module\.")
_MAX_DEPTH = 6
_MAX_TENSORS = 20_000
_SHOWN = 6


class Network(NamedTuple):
    """Part of a weight file's content that belongs to one network.

    Attributes:
        file: File content reduced to the network's tensors, with the prefix removed from the names.
        prefix: Prefix that was removed from the names.
        outside: Names of the tensors without this prefix.
    """

    file: WeightFile
    prefix: str = ""
    outside: tuple[str, ...] = ()


def only_network(file: WeightFile, timm: str = "") -> Network:
    """Return the state dict of the only network in a file, without the prefix of its tensor names.

    If no network is found, the content is returned unchanged.

    Args:
        file: File content.
        timm: Name such as "timm/regnety_002" if timm builds the network; otherwise empty.

    Raises:
        UserError: If there are several networks. The message lists their prefixes.
    """
    if OWN_METADATA in file.metadata or len(file.tensors) > _MAX_TENSORS:
        return Network(file)
    tensors = file.tensors
    found = _prefixes(tensors, file.metadata, timm)
    if not found:
        tensors = _without_parallel(tensors, timm)
        found = _prefixes(tensors, file.metadata, timm)
    if not found:
        return Network(file)
    if len(found) > 1:
        raise UserError(
            f"{file.path} contains {len(found)} networks, whose tensor names have the prefixes "
            f"{first_of(map(shown, found), _SHOWN)}. Select one with prefix= "
            f"(MODEL.WEIGHTS_PREFIX), such as prefix='{shown(found[0])}'."
        )
    prefix = found[0]
    inside = _without_parallel(_below(tensors, prefix), timm)
    notes = file.notes
    if prefix:
        note = f"the network's tensor names have the prefix {shown(prefix)}, which was removed"
        notes = (*notes, note)
    outside = tuple(name for name in tensors if not name.startswith(prefix))
    return Network(replace(file, tensors=inside, notes=notes), prefix, outside)


def contains_network(names: Iterable[str], timm: str = "") -> bool:
    """Return whether tensor names include those of a network of a known weight family.

    Args:
        names: Tensor names.
        timm: Name of a timm model whose tensor names are also searched for, or an empty string.
    """
    tensors = dict.fromkeys(names, torch.empty(0))
    found = bool(timm) and bool(_prefixes(tensors, {}, timm))
    return found or next(_networks(tensors, {}), None) is not None


def _without_parallel(tensors: dict[str, Tensor], timm: str) -> dict[str, Tensor]:
    """Remove ``module.``, which DataParallel adds if a script wraps only part of a network.

    The names are left unchanged if they would no longer be unique, or if the network's own names
    contain ``module.``.
    """
    renamed = {_PARALLEL.sub("", name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors) or renamed.keys() == tensors.keys():
        return tensors
    return tensors if timm and any(map(_PARALLEL.search, tensor_names(timm))) else renamed


def _prefixes(tensors: dict[str, Tensor], metadata: Mapping[str, Any], timm: str) -> list[str]:
    """Return the tensor-name prefix of each network in a file."""
    if not timm:
        return list(_networks(tensors, metadata))
    first = f"{first_convolution(timm)}.weight"
    found = [n.removesuffix(first) for n in tensors if f".{n}".endswith(f".{first}")]
    # Names of layers inside a network can end like that of its first convolution.
    outer: list[str] = []
    for prefix in sorted(found):
        if not outer or not prefix.startswith(outer[-1]):
            outer.append(prefix)
    order = {prefix: index for index, prefix in enumerate(found)}
    return sorted(outer, key=order.__getitem__)


def _networks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> Iterator[str]:
    """Yield the tensor-name prefix of each network in a file, outer networks first."""
    if _own(tensors, {}):
        yield prefix
        return
    skipped = ""
    if family := _family(tensors, metadata):
        inner = _below(tensors, _BACKBONE)
        other = _family(inner, metadata) if _unknown(family, tensors) else None
        # Unknown names in the backbone can also belong to a head.
        if other is None or 0 < _unknown(other, inner) >= _unknown_below(family, tensors):
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


def _unknown_below(family: Family, tensors: Mapping[str, Tensor]) -> int:
    return _unknown(family, {n: t for n, t in tensors.items() if n.startswith(_BACKBONE)})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
