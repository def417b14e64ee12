"""Extraction of a model's tensors and accompanying plain values from a checkpoint.

Checkpoints wrap a model's tensors in many ways, and often contain the optimizer, the scheduler and
the arguments of the run. Only the model's tensors are read into memory.
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

# In order of precedence. If a file contains both "state_dict" and "state_dict_ema", or "model" and
# "model_ema", the former is used.
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
# Prefixes that DataParallel and torch.compile add to all of a model's tensor names.
PREFIXES = ("module.", "_orig_mod.")

_TRAINER_STATE = ("optim", "sched", "scaler", "amp", "ema", "momentum")
_MAX_DEPTH = 5
_MAX_ENTRIES = 200_000
_MAX_PLAIN = 20_000
_MAX_TEXT = 2**17

_Source = TensorRef | np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a model by name, and the plain values stored with them."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]


def collect(tree: Any, path: Path, size: int) -> Checkpoint:
    """Extract a model's tensors from a checkpoint.

    Common wrappers are removed, and so are the prefixes ``module.`` and ``_orig_mod.`` if every
    name has them. Trainer state (optimizer, scheduler) is omitted, as are other objects of unknown
    classes outside the model.

    Args:
        tree: Object stored in the file, with tensors that have not been read yet.
        path: Path of the file, for error messages.
        size: Size of the file in bytes, which limits the memory of its tensors.

    Raises:
        UserError: If the object contains no named tensors, or the model is or contains an object of
            an unknown class.
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
            f"{path} contains a {kind}, so it is not a weight file. Expected a dictionary of named "
            "tensors, such as model.state_dict()."
        )
    sources: dict[str, _Source] = {}
    for name, source in _leaves(tree):
        if isinstance(source, Placeholder):
            reject_class(path, source.name)
        if name in sources:
            raise ValueError(f"two tensors have the name {name}")
        sources[name] = source
    _take_plain(
        metadata,
        {k: v for k, v in tree.items() if not (isinstance(v, dict) or k in sources)},
    )
    if not sources:
        found = shown(", ".join(repr(key) for key in list(tree)[:8])) or "nothing"
        raise UserError(f"{path} contains no model tensors (found: {found}). Check the file.")
    # In a malicious file, many tensors may be views of the same few bytes. Tied weights add up to
    # at most a small multiple of the file's size.
    if sum(source.nbytes for source in sources.values()) > 4 * size + 2**20:
        raise ValueError("its tensors would require far more memory than the file's size")
    tensors = {name: to_tensor(source) for name, source in _strip_prefixes(sources).items()}
    return Checkpoint(tensors, metadata)


def _wrapper(tree: dict) -> str | None:
    """Return the key of the model's state dict in ``tree``, or None if ``tree`` itself is one."""
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
    """Yield the tensors and placeholders in nested dictionaries, with their joined keys."""
    # A dictionary can contain another one many times, so both the depth and the number of entries
    # are limited.
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


class _NotPlain(Exception):  # noqa: N818 - only used in this file
    """Exception for a value that is not kept as metadata, because it is too large or not plain."""


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
