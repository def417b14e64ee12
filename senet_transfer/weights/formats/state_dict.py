"""Extraction of a model's tensors and accompanying metadata from a checkpoint.

Checkpoints wrap a model's tensors in many ways, and often also contain the optimizer, the scheduler
and the run's arguments. Only the model's tensors are read into memory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import Placeholder, reject_class
from senet_transfer.utils.text import shown
from senet_transfer.weights.formats.lazy_tensor import TensorRef, is_numeric, to_tensor
from senet_transfer.weights.formats.tensor_names import PREFIXES, Wanted, select

# Keys for a model's state dict, in order of precedence.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "blobs",
)
# Keys that are also used for parts of a network. They refer to a state dict only if no other
# dictionary at the same level contains tensors.
_WEAK_WRAPPERS = ("module", "network", "params", "weights", "model_weights")
# Keys for averaged weights: state_dict_ema (timm), model_ema (torchvision's references),
# ema_state_dict (mmengine), params_ema (BasicSR), ema, swa_model, ...
_AVERAGED = re.compile(
    r"(.*[_.-])?(ema|swa)([_.-].*|\d*|[A-Z].*)|.*EMA|.*(averaged|average|avg)_model(_.*)?"
)
# Keys that take precedence over unknown keys.
_USUAL_AVERAGED = ("state_dict_ema", "model_ema")

_TRAINER_STATE = ("optim", "sched", "scaler", "amp", "ema", "momentum")
_MAX_DEPTH = 5
_MAX_ENTRIES = 200_000
_MAX_PLAIN = 20_000
_MAX_TEXT = 2**17

_Source = TensorRef | np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a model and the metadata stored with them.

    Attributes:
        tensors: Tensors by name, without the prefixes of wrappers.
        metadata: Small plain values.
        file_names: Name of each tensor in the file's state dict.
        dropped: Names (in the file) of omitted tensors, and why each was omitted.
        notes: Sentences on which of several sets of weights were selected.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    file_names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def collect(tree: Any, path: Path, size: int, wanted: Wanted) -> Checkpoint:
    """Extract a model's tensors from a checkpoint.

    Common wrappers and the prefixes that they add to names are removed; see
    :func:`~.tensor_names.select`. Trainer state (optimizer, scheduler) is omitted, as are objects
    of unknown classes outside the model. If the checkpoint contains dictionaries for several
    networks at the same level, their keys become prefixes of the tensor names.

    Args:
        tree: Object stored in the file. Its tensors have not been read yet.
        path: Path of the file, for error messages.
        size: Size of the file in bytes, which limits the memory for tensors.
        wanted: Network to take from the file.

    Raises:
        UserError: If the object contains no named tensors, the model is or contains an object of an
            unknown class, or the wanted network is not in the file.
    """
    metadata: dict[str, Any] = {}
    notes: list[str] = []
    prefix, averaged = wanted.prefix, False
    for _ in range(_MAX_DEPTH):
        choice = _choose(tree, prefix, wanted.ema, path) if isinstance(tree, dict) else None
        if choice is None:
            break
        _take_plain(metadata, {k: v for k, v in tree.items() if v is not tree[choice.key]})
        _check_partitions(tree, choice.key, path)
        notes += [choice.note] if choice.note else []
        averaged = averaged or choice.averaged
        tree, prefix = tree[choice.key], choice.prefix
    if wanted.ema and not averaged:
        raise UserError(
            f"{path} contains no EMA weights in addition to the plain weights. Remove ema=True "
            "(MODEL.WEIGHTS_EMA), or select the network with prefix= (MODEL.WEIGHTS_PREFIX)."
        )
    if isinstance(tree, Placeholder):
        reject_class(path, tree.name)
    if not isinstance(tree, dict):
        kind = "single tensor" if isinstance(tree, _Source) else type(tree).__name__
        raise UserError(
            f"{path} contains a {kind}, so it is not a weight file. Expected a dictionary of named "
            "tensors, such as model.state_dict()."
        )
    sources = _named_tensors(_networks(tree) or tree, path)
    _take_plain(
        metadata,
        {k: v for k, v in tree.items() if not (isinstance(v, dict) or k in sources)},
    )
    if not sources:
        _reject_model_objects(tree, path)
        found = shown(", ".join(repr(key) for key in list(tree)[:8])) or "nothing"
        raise UserError(f"{path} contains no model tensors (found: {found}). Check the file.")
    # In a malicious file, many tensors may be views of the same few bytes. Legitimate tied weights
    # use at most a small multiple of the file's size.
    if sum(source.nbytes for source in sources.values()) > 4 * size + 2**20:
        raise ValueError("its tensors would require far more memory than the file's size")
    selected = select({name: source.size for name, source in sources.items()}, prefix, path)
    tensors = {name: to_tensor(sources[own]) for name, own in selected.kept.items()}
    return Checkpoint(tensors, metadata, selected.kept, selected.dropped, tuple(notes))


def _named_tensors(tree: dict, path: Path) -> dict[str, _Source]:
    sources: dict[str, _Source] = {}
    for name, source in _leaves(tree):
        if isinstance(source, Placeholder):
            reject_class(path, source.name)
        if name in sources:
            raise ValueError(f"two tensors have the name {name}")
        sources[name] = source
    return sources


class _Choice(NamedTuple):
    """Selected key of a checkpoint, the rest of the wanted prefix, and a note for the user."""

    key: str
    prefix: str
    averaged: bool = False
    note: str = ""


def _choose(tree: dict, prefix: str, ema: bool | None, path: Path) -> _Choice | None:
    """Select the entry that contains the model, or return None if ``tree`` is a state dict."""
    start = prefix.removesuffix(".") + "."
    for key in tree if prefix else ():
        if isinstance(key, str) and start.startswith(f"{key}.") and _has_tensors(tree[key]):
            return _Choice(key, start.removeprefix(f"{key}.").removesuffix("."), bool(ema))
    plain = _wrapper(tree)
    averaged = [key for key in tree if isinstance(key, str) and _is_averaged(key, tree[key])]
    if not averaged:
        return _Choice(plain, prefix) if plain is not None else None
    usual = [key for key in _USUAL_AVERAGED if key in averaged]
    first = (usual or averaged)[0]
    alone = not (_has_direct_tensors(tree) or len(_candidates(tree)) > 1)
    if plain is None and ema is None and not alone and not usual:
        return None
    # A dictionary with a different key can also be a loss with buffers or a second network.
    guessed = plain is not None and plain not in WRAPPERS
    small = guessed and _count(tree[first]) > 2 * _count(tree[plain])
    if plain in averaged or small or (guessed and usual and ema is not False):
        plain = None
    if plain is None:
        if ema is False:
            raise UserError(
                f"{path} contains only EMA weights ({shown(first)}), but ema is False "
                "(MODEL.WEIGHTS_EMA). Remove this setting."
            )
        return _Choice(first, prefix, True, f"the weights are EMA weights ({shown(first)})")
    if _is_mmengine(tree) and first == "ema_state_dict" and plain == "state_dict":
        # mmengine's EMAHook swaps the values of these two entries when it saves a checkpoint.
        names = ("ema_state_dict", "state_dict")
        swapped = ", which mmengine swaps when saving a checkpoint"
        take = ema is not False
    else:
        names, swapped = (plain, first), ""
        take = ema if ema is not None else _is_timm(tree, plain, first)
    used, other = (names[1], names[0]) if take else names
    kinds = ("EMA", "plain") if take else ("plain", "EMA")
    return _Choice(
        used,
        prefix,
        take,
        f"the {kinds[0]} weights ({shown(used)}) were taken; the file also contains {kinds[1]} "
        f"weights ({shown(other)}){swapped}: set ema={not take} (MODEL.WEIGHTS_EMA) to use them",
    )


def _is_averaged(key: str, value: Any) -> bool:
    return bool(_AVERAGED.fullmatch(key)) and not _is_optimizer(key) and _is_network(value)


def _is_optimizer(key: str) -> bool:
    return any(word in key.lower() for word in ("optim", "sched", "scaler"))


def _is_network(value: Any) -> bool:
    """Return whether a value is a dictionary with tensors other than counters."""
    return isinstance(value, dict) and any(
        is_numeric(leaf) and leaf.size > 1
        for _, leaf in _leaves(value)
        if not isinstance(leaf, Placeholder)
    )


def _count(value: dict) -> int:
    return sum(1 for _ in _leaves(value))


def _is_mmengine(tree: dict) -> bool:
    meta = tree.get("meta")
    return "message_hub" in tree or (isinstance(meta, dict) and "mmengine_version" in meta)


def _is_timm(tree: dict, plain: str, averaged: str) -> bool:
    """Return whether timm wrote a checkpoint. timm's own loader uses the EMA weights."""
    if (plain, averaged) != ("state_dict", "state_dict_ema"):
        return False
    names = [{_bare(name) for name, _ in _leaves(tree[key])} for key in (plain, averaged)]
    return names[0] == names[1] - {"n_averaged"}


def _bare(name: str) -> str:
    while any(name.startswith(prefix) for prefix in PREFIXES):
        name = name.partition(".")[2]
    return name


def _check_partitions(tree: dict, key: str, path: Path) -> None:
    """Raise UserError for a DeepSpeed ZeRO-3 file, in which the parameters are empty."""
    if not ({"ds_config", "ds_version"} & tree.keys()) or not isinstance(tree[key], dict):
        return
    weights = [
        leaf
        for name, leaf in _leaves(tree[key])
        if is_numeric(leaf) and name.endswith((".weight", ".bias"))
    ]
    if weights and not any(isinstance(w, _Source) and w.size for w in weights):
        raise UserError(
            f"{path} is one partition of a DeepSpeed ZeRO-3 checkpoint, whose parameters are "
            "distributed over several files. Join them with DeepSpeed's script in the checkpoint "
            "folder: python zero_to_fp32.py . weights."
        )


def _reject_model_objects(tree: dict, path: Path) -> None:
    for key, value in tree.items():
        if isinstance(value, Placeholder) and _AVERAGED.fullmatch(str(key)):
            reject_class(path, value.name)


def _networks(tree: dict) -> dict | None:
    """Return the entries with networks if there are several of them in ``tree``, otherwise None."""
    if _has_direct_tensors(tree):
        return None
    found = {key: tree[key] for key in _candidates(tree)}
    return found if len(found) > 1 and any(map(_is_nested, found.values())) else None


def _is_nested(value: dict) -> bool:
    return any(isinstance(name, str) and "." in name for name in value)


def _candidates(tree: dict) -> list[str]:
    return [
        key
        for key, value in tree.items()
        if isinstance(key, str) and not _is_trainer_state(key) and _has_tensors(value)
    ]


def _wrapper(tree: dict) -> str | None:
    """Return the key of the model's state dict in ``tree``, or None if ``tree`` itself is one."""
    for key in WRAPPERS:
        if isinstance(tree.get(key), Placeholder) or _has_tensors(tree.get(key)):
            return key
    inner = _candidates(tree)
    if len(inner) == 1 and (inner[0] in _WEAK_WRAPPERS or not _has_direct_tensors(tree)):
        return inner[0]
    return None


def _has_direct_tensors(tree: dict) -> bool:
    return any(is_numeric(value) for value in tree.values())


def _is_trainer_state(key: str) -> bool:
    return any(word in key.lower() for word in _TRAINER_STATE)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(is_numeric(leaf) for _, leaf in _leaves(value))


def _leaves(
    tree: dict, depth: int = _MAX_DEPTH, prefix: str = "", budget: list[int] | None = None
) -> Iterator[tuple[str, _Source | Placeholder]]:
    """Yield the tensors and placeholders in nested dictionaries, with their joined keys."""
    # A dictionary can contain the same dictionary many times, so both the depth and the number of
    # entries are limited.
    budget = [_MAX_ENTRIES] if budget is None else budget
    for key, value in tree.items():
        budget[0] -= 1
        if budget[0] < 0:
            raise ValueError(f"it contains more than {_MAX_ENTRIES:,} entries")
        if isinstance(key, Placeholder):
            yield prefix, key
        elif not isinstance(key, str):
            continue
        elif is_numeric(value) or isinstance(value, Placeholder):
            yield prefix + key, value
        elif isinstance(value, dict) and depth > 1 and (prefix or not _is_trainer_state(key)):
            yield from _leaves(value, depth - 1, f"{prefix}{key}.", budget)


def _take_plain(metadata: dict[str, Any], values: dict) -> None:
    for key, value in values.items():
        if isinstance(key, str) and key not in metadata and not _is_trainer_state(key):
            try:
                metadata[key] = _plain(value, [_MAX_PLAIN])
            except _NotPlain:
                continue


class _NotPlain(Exception):  # noqa: N818 - only used in this file
    """Exception for values that are too large or not plain, so they are not kept as metadata."""


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Return a small plain value, with one-element tensors as numbers, or raise _NotPlain."""
    budget[0] -= 1
    if budget[0] < 0 or depth > 2 * _MAX_DEPTH:
        raise _NotPlain
    if isinstance(value, list | tuple):
        return [_plain(item, budget, depth + 1) for item in value]
    if isinstance(value, dict):
        return {
            key: _plain(item, budget, depth + 1)
            for key, item in value.items()
            if isinstance(key, str | int) and not isinstance(item, Placeholder)
        }
    if is_numeric(value) and value.size == 1:
        return to_tensor(value).item()
    if (
        isinstance(value, bool | float | None)
        or (isinstance(value, int) and value.bit_length() <= 64)
        or (isinstance(value, str) and len(value) <= _MAX_TEXT)
    ):
        return value
    raise _NotPlain
