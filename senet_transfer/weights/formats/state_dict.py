"""Extraction of a model's tensors and accompanying metadata from a checkpoint.

Training scripts store a model's state dict under various keys, often next to the states of the
optimizer and the scheduler. Only the model's tensors are read into memory.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import UNREAD_ARRAY, Placeholder, reject_class
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.formats.lazy_tensor import TensorRef, is_numeric, to_tensor
from senet_transfer.weights.formats.tensor_names import (
    MMCV_COPY,
    PREFIXES,
    Selected,
    Wanted,
    has_prefix,
    outside_prefix,
    select,
)

# Keys for a model's state dict, in order of precedence.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "blobs",
)
# Words in keys for averaged weights, such as state_dict_ema (timm), model_ema (torchvision's
# references), ema_state_dict (mmengine), params_ema (BasicSR), swa_model, averaged_state_dict.
_AVERAGED = frozenset({"ema", "swa", "avg", "average", "averaged", "polyak", "shadow"})
# Keys that take precedence over unknown keys.
_USUAL_AVERAGED = ("state_dict_ema", "model_ema")

# DeepSpeed's copies of the parameters that are not trained.
_FROZEN_COPIES = "frozen_param_fragments"
# Words in keys for the state of a trainer, which has tensors but is not a network.
_TRAINER_WORD = re.compile(r"opt|optims?|\w*optimi[sz]er\w*|\w*sched\w*|(grad)?scalers?|amp")
# Parts of keys that do not denote the network if there is another candidate.
_AUXILIARY = ("optim", "sched", "scaler", "amp", "ema", "momentum")
# Last parts of the names of a network's tensors. Metrics and random states have other names.
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
_MAX_DEPTH = 5
_MAX_ENTRIES = 200_000
# Limit for all dictionaries together. Within the limits of safe_pickle, a file has fewer entries
# unless it refers to the same dictionary repeatedly.
_MAX_TOTAL = 700_000
_MAX_PLAIN = 20_000
_MAX_TEXT = 2**17
_LISTED = 4

_Source = TensorRef | np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a model and the metadata stored with them.

    Attributes:
        tensors: Tensors by name. Prefixes added by wrappers, such as ``module.``, are removed.
        metadata: Small values of plain Python types, such as the epoch.
        file_names: Name of each tensor in the file's state dict.
        dropped: Names (in the file) of omitted tensors, and why each was omitted.
        notes: Notes about the selection among several sets of weights, such as EMA weights.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    file_names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def collect(tree: Any, path: Path, size: int, wanted: Wanted) -> Checkpoint:
    """Extract a model's tensors from a checkpoint.

    Outer dictionaries, such as ``{"state_dict": ...}``, and prefixes that wrappers such as
    DataParallel add to tensor names are removed; see :func:`~.tensor_names.select`. Trainer state
    (optimizer, scheduler) is omitted, as are objects of unknown classes outside the model. If the
    checkpoint contains dictionaries for several networks at the same level, their keys become
    prefixes of the tensor names.

    Args:
        tree: Object stored in the file. Its tensors have not been read yet.
        path: Path of the file, for error messages.
        size: Size of the file in bytes, which limits the memory for tensors.
        wanted: Network to extract.

    Raises:
        UserError: If the object contains no named tensors, the model is or contains an object of an
            unknown class, or the wanted network is not in the file.
    """
    root = tree
    metadata: dict[str, Any] = {}
    notes: list[str] = []
    outside: list[str] = []
    prefix, averaged = wanted.prefix, False
    for _ in range(_MAX_DEPTH):
        choice = _choose(tree, prefix, wanted.ema, path) if isinstance(tree, dict) else None
        if choice is None:
            break
        _take_plain(metadata, {k: v for k, v in tree.items() if v is not tree[choice.key]})
        _check_partitions(tree, choice.key, path)
        if choice.prefix != prefix:
            others = {key: tree[key] for key in _candidates(tree) if key != choice.key}
            outside += [name for name, _ in _leaves(others)]
        notes += choice.notes
        averaged = averaged or choice.averaged
        tree, prefix = tree[choice.key], choice.prefix
    if isinstance(tree, Placeholder):
        reject_class(path, tree.name)
    if not isinstance(tree, dict):
        kind = "single tensor" if isinstance(tree, _Source) else type(tree).__name__
        raise UserError(
            f"{path} contains a {kind}, so it is not a weight file. Expected a dictionary of named "
            "tensors, such as model.state_dict()."
        )
    notes += _others({k: v for k, v in tree.items() if isinstance(k, str) and _is_auxiliary(k)})
    entries = _model_entries(tree) if tree is root else tree
    sources = _named_tensors(_networks(tree) or entries, path)
    _take_plain(
        metadata,
        {k: v for k, v in tree.items() if not (isinstance(v, dict) or k in sources)},
    )
    if not sources:
        _reject_objects(tree, path)
        keys = [key for key in tree if isinstance(key, str)]
        found = shown(", ".join(map(repr, keys[:8]))) or "nothing"
        raise UserError(f"{path} contains no model tensors (found: {found}). Check the file.")
    # In a malicious file, many tensors may be views of the same few bytes. Legitimate tied weights
    # use at most a small multiple of the file's size.
    if sum(source.nbytes for source in sources.values()) > 4 * size + 2**20:
        raise ValueError("its tensors would require far more memory than the size of the file")
    selected = select({name: source.size for name, source in sources.items()}, prefix, path)
    if not averaged:
        check_named_ema(path, wanted, selected)
    tensors = {name: to_tensor(sources[own]) for name, own in selected.kept.items()}
    dropped = dict.fromkeys(outside, outside_prefix(wanted.prefix)) | selected.dropped
    return Checkpoint(tensors, metadata, selected.kept, dropped, tuple(notes))


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
    """Checkpoint entry that was selected as the model's state dict.

    Attributes:
        key: Key of the entry.
        prefix: Prefix of the wanted tensor names within the entry.
        averaged: Whether the entry contains EMA weights.
        notes: Notes for the user.
    """

    key: str
    prefix: str
    averaged: bool = False
    notes: tuple[str, ...] = ()


class _Pair(NamedTuple):
    """Keys of the non-averaged and the averaged weights, for projects that swap the two.

    For example, mmengine's EMAHook swaps the two sets of weights when it saves a checkpoint, so
    the key "state_dict" contains the averaged weights.
    """

    plain: str
    averaged: str
    project: str


def _choose(tree: dict, prefix: str, ema: bool | None, path: Path) -> _Choice | None:
    """Select the entry that contains the model's state dict.

    The result is None if ``tree`` itself is the state dict, or if the entry can't be identified.
    """
    if prefix and (choice := _by_prefix(tree, prefix, ema)):
        return choice
    plain, averaged = _plain_and_averaged(tree, ema)
    if averaged is None:
        return None if plain is None else _only_plain(tree, plain, prefix, ema, path)
    if plain is None:
        if ema is False:
            raise UserError(
                f"{path} contains only EMA weights ({shown(averaged)}), but ema is False "
                "(MODEL.WEIGHTS_EMA). Remove this setting."
            )
        note = f"the weights are EMA weights ({shown(averaged)})"
        return _Choice(averaged, prefix, True, (note, *_others(tree, averaged)))
    pair = _swapped(tree)
    if pair:
        take, swapped = ema is not False, f", which {pair.project} swaps when saving a checkpoint"
    else:
        take, swapped = ema if ema is not None else _is_timm(tree, plain, averaged), ""
    used, other = (averaged, plain) if take else (plain, averaged)
    kinds = ("EMA", "plain") if take else ("plain", "EMA")
    note = (
        f"the {kinds[0]} weights ({shown(used)}) were taken; the file also contains {kinds[1]} "
        f"weights ({shown(other)}){swapped}: set ema={not take} (MODEL.WEIGHTS_EMA) to use them"
    )
    return _Choice(used, prefix, take, (note, *_others(tree, used, other)))


def _by_prefix(tree: dict, prefix: str, ema: bool | None) -> _Choice | None:
    """Select the entry whose key is the start of ``prefix``, such as "model" for "model.backbone".

    If no entry can be selected, return None.
    """
    start = prefix.removesuffix(".") + "."
    for key, value in tree.items():
        if isinstance(key, str) and start.startswith(f"{key}.") and _has_tensors(value):
            if not has_prefix((name for name, _ in _leaves(value)), prefix):
                return _Choice(key, start.removeprefix(f"{key}.").removesuffix("."), bool(ema))
            # The names in this dictionary begin with the same word as its key.
            return None if ema else _Choice(key, prefix)
    return None


def _plain_and_averaged(tree: dict, ema: bool | None) -> tuple[str | None, str | None]:
    """Return the key of the non-averaged weights and the key of the averaged weights.

    A key is None if there are no such weights, or if they can't be identified.
    """
    if pair := _swapped(tree):
        return pair.plain, pair.averaged
    plain = _wrapper(tree)
    budget = [_MAX_TOTAL]
    averaged = [key for key in tree if _is_averaged(key, tree[key], budget)]
    if not averaged:
        return plain, None
    usual = [key for key in _USUAL_AVERAGED if key in averaged]
    several = plain is None and (_is_flat(tree) or len(_candidates(tree)) > 1)
    if several and not (ema or (usual and ema is None)):
        return None, None
    # A dictionary with an unknown key can also be a loss with buffers or a second network.
    guessed = plain is not None and plain not in WRAPPERS
    if guessed and (not _is_network(tree[plain]) or (usual and ema is not False)):
        plain = None
    return plain, (usual or averaged)[0]


def _only_plain(tree: dict, plain: str, prefix: str, ema: bool | None, path: Path) -> _Choice:
    unread = tuple(_unreadable_averages(tree))
    if ema and unread:
        raise UserError(
            f"The EMA weights in {path} can't be loaded: {'; '.join(unread)}. Load the file with "
            "the code that saved it, copy the EMA weights to the model, and save "
            "model.state_dict()."
        )
    return _Choice(plain, prefix, notes=(*unread, *_others(tree, plain)))


def _swapped(tree: dict) -> _Pair | None:
    meta = tree.get("meta")
    if "message_hub" in tree or (isinstance(meta, dict) and "mmengine_version" in meta):
        pair = _Pair("ema_state_dict", "state_dict", "mmengine's EMAHook")
    elif "averaging_state" in tree:
        pair = _Pair("current_model_state", "state_dict", "Lightning's WeightAveraging")
    else:
        return None
    return pair if _has_tensors(tree.get(pair.plain)) and _has_tensors(tree["state_dict"]) else None


def _others(tree: dict, *used: str) -> tuple[str, ...]:
    """Return a note if a checkpoint contains a network under a key that is not in ``used``."""
    others: list[str] = []
    budget = [_MAX_ENTRIES]
    with contextlib.suppress(_TooManyEntries):
        for key, value in tree.items():
            if isinstance(key, str) and key not in used and not _is_trainer_state(key):
                others += [key] * _is_network(value, budget)
    if not others:
        return ()
    return (
        f"the file also contains a network under {first_of(map(shown, others), _LISTED)}; to load "
        f"it, set prefix={shown(others[0])!r} (MODEL.WEIGHTS_PREFIX)",
    )


def _unreadable_averages(tree: dict) -> Iterator[str]:
    """Yield a message for each entry with averaged weights that can't be read.

    Such entries are objects of unsupported classes, or lists of tensors without names.
    """
    for key, value in tree.items():
        if not isinstance(key, str) or not _words(key) & _AVERAGED:
            continue
        if isinstance(value, Placeholder):
            yield f"{shown(key)} is an object of the class {value.name}, which is not read"
        elif any(map(_is_tensor_list, value.values() if isinstance(value, dict) else [value])):
            yield f"{shown(key)} is a list of tensors without names, which is not read"


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 1 and all(map(is_numeric, value[:2]))


def check_named_ema(path: Path, wanted: Wanted, selected: Selected) -> None:
    """Raise a UserError if ``wanted`` requests EMA weights, but its prefix does not select any.

    Args:
        path: Path of the file, which contains no separate state dict of EMA weights.
        wanted: Specification of the network to load.
        selected: Tensor names that the prefix selects, and the names that :func:`select` omits.
    """
    if not wanted.ema or _words(wanted.prefix) & _AVERAGED:
        return
    starts = dict.fromkeys(name.partition(".")[0] for name in selected.kept if "." in name)
    averaged = [start for start in starts if _words(start) & _AVERAGED]
    if averaged:
        raise UserError(
            f"The EMA weights in {path} have the prefix {shown(averaged[0])}. Set "
            f"prefix='{shown(averaged[0])}.' (MODEL.WEIGHTS_PREFIX) instead of ema=True "
            "(MODEL.WEIGHTS_EMA)."
        )
    if MMCV_COPY in selected.dropped.values():
        raise UserError(
            f"{path} contains copies of the weights from mmcv's EMAHook, which can't be selected "
            "with ema=True (MODEL.WEIGHTS_EMA). If the hook had a higher priority than "
            "CheckpointHook (50), as in MMDetection's configs, the weights under the usual tensor "
            "names are the EMA weights. Remove ema=True to load them."
        )
    raise UserError(
        f"{path} contains no EMA weights in a separate state dict. Remove ema=True "
        "(MODEL.WEIGHTS_EMA), or select the network with prefix= (MODEL.WEIGHTS_PREFIX)."
    )


def _words(key: str) -> set[str]:
    """Return the lower-case words of a key such as "state_dict_ema" or "modelEMA"."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)}


def _is_averaged(key: Any, value: Any, budget: list[int]) -> bool:
    return (
        isinstance(key, str)
        and bool(_words(key) & _AVERAGED)
        and not _is_trainer_state(key)
        and _has_parameters(value, budget)
    )


def _parameters(value: Any, budget: list[int] | None = None) -> Iterator[str]:
    """Yield the names of the parameters and norm statistics in nested dictionaries."""
    for name, leaf in _leaves(value, budget=budget) if isinstance(value, dict) else ():
        if _names_parameter(name) and not isinstance(leaf, Placeholder) and leaf.size > 1:
            yield name


def _names_parameter(name: str) -> bool:
    return name.rpartition(".")[2] in _PARAMETERS


def _has_parameters(value: Any, budget: list[int] | None = None) -> bool:
    return next(_parameters(value, budget), None) is not None


def _is_network(value: Any, budget: list[int] | None = None) -> bool:
    """Return whether a value is a dictionary with the weights of at least two layers."""
    weights = (name for name in _parameters(value, budget) if name.endswith(".weight"))
    return len(list(itertools.islice(weights, 2))) == 2


def _is_timm(tree: dict, plain: str, averaged: str) -> bool:
    """Return whether timm wrote a checkpoint.

    By default, the EMA weights of such a checkpoint are used, as in timm's own loader.
    """
    if (plain, averaged) != ("state_dict", "state_dict_ema"):
        return False
    names = [{_bare(name) for name, _ in _leaves(tree[key])} for key in (plain, averaged)]
    return names[0] == names[1] - {"n_averaged"}


def _bare(name: str) -> str:
    while any(name.startswith(prefix) for prefix in PREFIXES):
        name = name.partition(".")[2]
    return name


def _check_partitions(tree: dict, key: str, path: Path) -> None:
    """Raise a UserError for a DeepSpeed ZeRO-3 file, in which the parameters are empty."""
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
            "distributed over several files. Merge them with DeepSpeed's script in the "
            "checkpoint folder: python zero_to_fp32.py . weights"
        )


def _model_entries(tree: dict) -> dict:
    """Return a flat checkpoint's items, excluding unsupported objects and dicts without tensors.

    Items whose key contains a dot may belong to the model, so they are never excluded.
    """
    return {
        key: value
        for key, value in tree.items()
        if not isinstance(key, str) or "." in key or not _is_object(value)
    }


def _is_object(value: Any) -> bool:
    """Return whether a value is a dict without tensors, or an object of an unsupported class.

    An object of an unsupported class is represented by a ``Placeholder``. The result is False for
    placeholders of PyTorch's internal functions, such as those that rebuild tensors.
    """
    if isinstance(value, dict):
        return not _has_tensors(value)
    value = _as_leaf(value)
    return isinstance(value, Placeholder) and not value.name.startswith("torch._")


def _as_leaf(value: Any) -> Any:
    """Replace an array of objects, dates or 128-bit numbers with a placeholder.

    Other values are returned unchanged.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind not in "SU" and not is_numeric(value):
        return Placeholder(UNREAD_ARRAY)
    return value


def _reject_objects(tree: dict, path: Path) -> None:
    for _, value in _leaves(tree):
        if isinstance(value, Placeholder):
            reject_class(path, value.name)


def _networks(tree: dict) -> dict | None:
    """Return the state dicts in ``tree`` if there are several, otherwise None."""
    if any(map(is_numeric, tree.values())):
        return None
    found = {key: tree[key] for key in _candidates(tree)}
    return found if len(found) > 1 and any(map(_is_nested, found.values())) else None


def _is_nested(value: dict) -> bool:
    return any(isinstance(name, str) and "." in name for name in value)


def _candidates(tree: dict) -> list[str]:
    """Return the keys in ``tree`` that may contain state dicts of the model or its submodules."""
    budget = [_MAX_TOTAL]
    keys = [k for k, v in tree.items() if isinstance(k, str) and not _is_averaged(k, v, budget)]
    found = [k for k in keys if not _is_trainer_state(k) and _has_parameters(tree[k], budget)]
    if found:
        # A momentum encoder, for example, is an average of the network next to it.
        return [key for key in found if not _is_auxiliary(key)] or found
    return [key for key in keys if not _is_auxiliary(key) and _has_tensors(tree[key])]


def _wrapper(tree: dict) -> str | None:
    """Return the key of the model's state dict in ``tree``.

    The result is None if ``tree`` itself is the state dict, or if the key can't be identified.
    """
    keys = (*WRAPPERS, "module") if _is_deepspeed(tree) else WRAPPERS
    for key in keys:
        if _has_tensors(tree.get(key)):
            return key
    for key in keys:
        if isinstance(tree.get(key), Placeholder):
            return key
    inner = _candidates(tree)
    return inner[0] if len(inner) == 1 and not _is_flat(tree) else None


def _is_deepspeed(tree: dict) -> bool:
    return "ds_config" in tree or "ds_version" in tree


def _is_flat(tree: dict) -> bool:
    """Return whether ``tree`` itself is a state dict.

    This is the case if it directly contains a tensor with a typical parameter name, such as
    "conv1.weight". If all of its tensors have other names, they can also be metrics or random
    number generator states. In this case, ``tree`` is a state dict only if it contains no nested
    dictionary with parameters.
    """
    direct = [key for key, value in tree.items() if isinstance(key, str) and is_numeric(value)]
    if any(map(_names_parameter, direct)):
        return True
    budget = [_MAX_TOTAL]
    return bool(direct) and not any(_has_parameters(value, budget) for value in tree.values())


def _is_trainer_state(key: str) -> bool:
    return key == _FROZEN_COPIES or any(map(_TRAINER_WORD.fullmatch, _words(key)))


def _is_auxiliary(key: str) -> bool:
    """Return whether a key may denote averaged weights or trainer state instead of a network."""
    return any(part in key.lower() for part in _AUXILIARY)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(is_numeric(leaf) for _, leaf in _leaves(value))


class _TooManyEntries(ValueError):  # noqa: N818 - only used in this file
    """Exception for nested dictionaries with too many entries, including repeated ones."""


def _leaves(
    tree: dict, depth: int = _MAX_DEPTH, prefix: str = "", budget: list[int] | None = None
) -> Iterator[tuple[str, _Source | Placeholder]]:
    """Yield the tensors and placeholders in nested dictionaries, with names such as "a.b.c"."""
    # A dictionary can contain the same dictionary many times, so both the depth and the number of
    # entries are limited.
    budget = [_MAX_ENTRIES] if budget is None else budget
    for key, value in tree.items():
        budget[0] -= 1
        if budget[0] < 0:
            raise _TooManyEntries(f"its dictionaries contain more than {_MAX_ENTRIES:,} entries")
        if isinstance(key, Placeholder):
            yield prefix, key
        elif not isinstance(key, str):
            continue
        elif is_numeric(value) or isinstance(value := _as_leaf(value), Placeholder):
            yield prefix + key, value
        elif isinstance(value, dict) and depth > 1 and (prefix or not _is_auxiliary(key)):
            yield from _leaves(value, depth - 1, f"{prefix}{key}.", budget)


def _take_plain(metadata: dict[str, Any], values: dict) -> None:
    left = _MAX_TOTAL
    for key, value in values.items():
        if isinstance(key, str) and key not in metadata and not _is_auxiliary(key):
            budget = [_MAX_PLAIN]
            with contextlib.suppress(_NotPlain):
                metadata[key] = _plain(value, budget)
            left -= _MAX_PLAIN - budget[0]
            if left < 0:
                raise _TooManyEntries(f"its metadata contains more than {_MAX_TOTAL:,} values")


class _NotPlain(Exception):  # noqa: N818 - only used in this file
    """Exception for values that are too large for metadata or have no plain Python type."""


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Convert a small value in a checkpoint to plain Python types.

    One-element tensors become numbers. Dictionary items that can't be converted are left out.

    Raises:
        _NotPlain: If the value is too large or can't be converted.
    """
    budget[0] -= 1
    if budget[0] < 0 or depth > 2 * _MAX_DEPTH:
        raise _NotPlain
    if isinstance(value, Placeholder) and value.values:
        value = value.values
    if isinstance(value, list | tuple):
        return [_plain(item, budget, depth + 1) for item in value]
    if isinstance(value, dict):
        items = {}
        for key, item in value.items():
            with contextlib.suppress(_NotPlain):
                if isinstance(key, str | int):
                    items[key] = _plain(item, budget, depth + 1)
        return items
    if is_numeric(value) and value.size == 1:
        return to_tensor(value).item()
    if (
        isinstance(value, bool | float | None)
        or (isinstance(value, int) and value.bit_length() <= 64)
        or (isinstance(value, str) and len(value) <= _MAX_TEXT)
    ):
        return value
    raise _NotPlain
