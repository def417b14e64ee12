"""Extraction of a model's tensors, and the plain values stored with them, from a checkpoint.

People wrap a model's tensors in many ways and store the optimizer, the scheduler and the arguments
of the run with them. Only the model's tensors are read into memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import Placeholder, reject_class
from senet_transfer.utils.text import shown
from senet_transfer.weights.formats.lazy_tensor import TensorRef, is_numeric, to_tensor

# In this order: a file with "state_dict" and "state_dict_ema", or "model" and "ema", means the
# first; the second is used if the first is absent.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "blobs",
    "state_dict_ema",
    "model_ema",
)
# The prefixes that DataParallel and torch.compile add to every name of a model.
PREFIXES = ("module.", "_orig_mod.")

_TRAINER_STATE = ("optim", "sched", "scaler", "amp", "ema", "momentum")
_MAX_DEPTH = 5
_MAX_ENTRIES = 200_000
_MAX_PLAIN = 20_000
_MAX_TEXT = 2**17

_Source = TensorRef | np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors by name, and the plain values stored with them."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]


def collect(tree: Any, path: Path, size: int) -> Checkpoint:
    """Take a model's tensors out of a checkpoint.

    The usual wrappers are removed, and ``module.`` and ``_orig_mod.`` if every name has them.
    Trainer state (optimizer, scheduler) is left out, and so are objects next to the model whose
    class is unknown.

    Args:
        tree: The object in the file, with tensors that are not yet read.
        path: The path of the file, for error messages.
        size: The size of the file in bytes, which bounds the memory of its tensors.

    Raises:
        UserError: The object contains no named tensors, or the model is or contains an object of an
            unknown class.
    """
    metadata: dict[str, Any] = {}
    for _ in range(_MAX_DEPTH):
        inner = _wrapper(tree) if isinstance(tree, dict) else None
        if inner is None:
            break
        _take_plain(metadata, {k: v for k, v in tree.items() if v is not tree[inner]})
        tree = tree[inner]
    if isinstance(tree, Placeholder):
        reject_class(path, tree.name)
    if not isinstance(tree, dict):
        kind = "single tensor" if isinstance(tree, _Source) else type(tree).__name__
        raise UserError(
            f"{path}: contains a {kind}, so it is not a weights file. Expected a dictionary of "
            "named tensors, such as model.state_dict()."
        )
    sources: dict[str, _Source] = {}
    for name, source in _leaves(tree):
        if isinstance(source, Placeholder):
            reject_class(path, source.name)
        if name in sources:
            raise ValueError(f"two tensors of the name {name}")
        sources[name] = source
    _take_plain(
        metadata,
        {k: v for k, v in tree.items() if not (isinstance(v, dict) or k in sources)},
    )
    if not sources:
        found = shown(", ".join(repr(key) for key in list(tree)[:8])) or "nothing"
        raise UserError(f"{path}: no model tensors inside (found: {found}). Check the file.")
    # Many tensors may be views of the same few bytes. Twice is tied weights; this is a bomb.
    if sum(source.nbytes for source in sources.values()) > 4 * size + 2**20:
        raise ValueError("its tensors would take far more memory than the file's size")
    tensors = {name: to_tensor(source) for name, source in _strip_prefixes(sources).items()}
    return Checkpoint(tensors, metadata)


def _wrapper(tree: dict) -> str | None:
    """Return the key of the model in ``tree``, or None if ``tree`` is the model itself."""
    for key in WRAPPERS:
        if isinstance(tree.get(key), Placeholder) or _has_tensors(tree.get(key)):
            return key
    if any(is_numeric(value) for value in tree.values()):
        return None
    inner = [
        key
        for key, value in tree.items()
        if isinstance(key, str) and not _is_trainer_state(key) and _has_tensors(value)
    ]
    return inner[0] if len(inner) == 1 else None


def _is_trainer_state(key: str) -> bool:
    return any(word in key.lower() for word in _TRAINER_STATE)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(is_numeric(leaf) for _, leaf in _leaves(value))


def _leaves(
    tree: dict, depth: int = _MAX_DEPTH, prefix: str = "", budget: list[int] | None = None
) -> Iterator[tuple[str, _Source | Placeholder]]:
    """Yield the tensors and placeholders in nested dictionaries, by their joined keys."""
    # A dictionary can hold another one many times: the walk is bounded, not only its depth.
    budget = [_MAX_ENTRIES] if budget is None else budget
    for key, value in tree.items():
        budget[0] -= 1
        if budget[0] < 0:
            raise ValueError(f"more than {_MAX_ENTRIES:,} entries")
        if isinstance(key, Placeholder):
            yield prefix, key
        elif not isinstance(key, str):
            continue
        elif is_numeric(value) or isinstance(value, Placeholder):
            yield prefix + key, value
        elif isinstance(value, dict) and depth > 1 and (prefix or not _is_trainer_state(key)):
            yield from _leaves(value, depth - 1, f"{prefix}{key}.", budget)


def _strip_prefixes(sources: dict[str, _Source]) -> dict[str, _Source]:
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in sources)), None):
        sources = {name.removeprefix(prefix): source for name, source in sources.items()}
    return sources


def _take_plain(metadata: dict[str, Any], values: dict) -> None:
    for key, value in values.items():
        if isinstance(key, str) and key not in metadata and not _is_trainer_state(key):
            try:
                metadata[key] = _plain(value, [_MAX_PLAIN])
            except _NotPlain:
                continue


class _NotPlain(Exception):  # noqa: N818 - it never leaves this file
    """Value that is not kept as metadata: too large, or not made of plain values."""


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Return a small plain value (a one-element tensor as its number), or raise _NotPlain."""
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
