"""From the object that a checkpoint file holds to the model's tensors, and what is said about them.

People wrap a model's tensors in many ways and put the optimizer, the scheduler and the arguments of
the run beside them. Only the model's tensors are turned into memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.plain_values import TensorSource
from senet_transfer.weights.formats.refusal import shown

# In this order: a file with "state_dict" and "state_dict_ema", or "model" and "ema", means the
# first; the second is taken where the first is absent.
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
# What DataParallel and torch.compile put before every name of a model.
PREFIXES = ("module.", "_orig_mod.")

_BESIDE_THE_MODEL = ("optim", "sched", "scaler", "amp", "ema", "momentum")
_MAX_DEPTH = 5
_MAX_ENTRIES = 200_000
_MAX_PLAIN = 20_000
_MAX_TEXT = 2**17


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: the model's tensors by name, and plain values found beside them."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]


def collect(tree: Any, path: Path, size: int) -> Checkpoint:
    """Takes a model's tensors out of a checkpoint.

    The usual wrappers are peeled, ``module.`` and ``_orig_mod.`` too where every name has them.
    Trainer state (optimizer, scheduler) is left out.

    Args:
        tree: what the file's reader returned; tensors are :class:`TensorSource`.
        path: for error messages.
        size: of the file in bytes, which bounds the memory that its tensors may take.

    Raises:
        UserError: there are no named tensors inside.
    """
    metadata: dict[str, Any] = {}
    for _ in range(_MAX_DEPTH):
        if not isinstance(tree, dict):
            break
        inner = _wrapped(tree)
        if inner is None:
            break
        _take_plain(metadata, {k: v for k, v in tree.items() if v is not tree[inner]})
        tree = tree[inner]
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: holds {_kind(tree)} and no tensors by name, so it is no weights file. "
            "Expected is a dictionary of tensors, such as model.state_dict()."
        )
    sources = _flatten(tree)
    _take_plain(metadata, {k: v for k, v in tree.items() if not isinstance(v, dict)}, sources)
    if not sources:
        found = shown(", ".join(repr(key) for key in list(tree)[:8])) or "nothing"
        raise UserError(f"{path}: no model tensors inside (found: {found}). Check the file.")
    return Checkpoint(_materialise(_strip_prefixes(sources), size), metadata)


def _wrapped(tree: dict) -> str | None:
    """The key under which the model is, or None where ``tree`` is the model itself."""
    for key in WRAPPERS:
        if isinstance(tree.get(key), dict) and _has_tensors(tree[key]):
            return key
    if any(_is_tensor(value) for value in tree.values()):
        return None
    inner = [
        key
        for key, value in tree.items()
        if isinstance(key, str) and not _is_beside(key) and _has_tensors(value)
    ]
    return inner[0] if len(inner) == 1 else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorSource) and value.is_numeric


def _is_beside(key: str) -> bool:
    return any(word in key.lower() for word in _BESIDE_THE_MODEL)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and next(_leaves(value, _MAX_DEPTH), None) is not None


def _leaves(tree: dict, depth: int, prefix: str = "", budget: list[int] | None = None):
    # A dictionary can hold another one many times over: the walk is bounded, not only its depth.
    budget = [_MAX_ENTRIES] if budget is None else budget
    for key, value in tree.items():
        budget[0] -= 1
        if budget[0] < 0:
            raise ValueError(f"more than {_MAX_ENTRIES:,} entries")
        if not isinstance(key, str):
            continue
        if _is_tensor(value):
            yield prefix + key, value
        elif isinstance(value, dict) and depth > 1 and not (prefix == "" and _is_beside(key)):
            yield from _leaves(value, depth - 1, f"{prefix}{key}.", budget)


def _flatten(tree: dict) -> dict[str, TensorSource]:
    sources: dict[str, TensorSource] = {}
    for name, source in _leaves(tree, _MAX_DEPTH):
        if name in sources:
            raise ValueError(f"two tensors of the name {name}")
        sources[name] = source
    return sources


def _strip_prefixes(sources: dict[str, TensorSource]) -> dict[str, TensorSource]:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in sources):
                sources = {name.removeprefix(prefix): s for name, s in sources.items()}
                stripped = True
    return sources


def _materialise(sources: dict[str, TensorSource], size: int) -> dict[str, torch.Tensor]:
    # Many tensors may view the same few bytes. Twice is tied weights; this is a bomb.
    if sum(source.nbytes for source in sources.values()) > 4 * size + 2**20:
        raise ValueError("its tensors would take far more memory than the file's size")
    return {name: source.tensor() for name, source in sources.items()}


def _take_plain(metadata: dict[str, Any], values: dict, but: Any = ()) -> None:
    for key, value in values.items():
        if isinstance(key, str) and not (key in but or key in metadata or _is_beside(key)):
            plain = _plain(value, [_MAX_PLAIN])
            if plain is not _TOO_MUCH:
                metadata[key] = plain


_TOO_MUCH = object()


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """``value`` if it is small and plain (a one-element tensor is its number), else _TOO_MUCH."""
    budget[0] -= 1
    if budget[0] < 0 or depth > 2 * _MAX_DEPTH:
        return _TOO_MUCH
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else _TOO_MUCH
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else _TOO_MUCH
    if isinstance(value, TensorSource):
        return value.tensor().item() if value.is_numeric and value.numel == 1 else _TOO_MUCH
    if isinstance(value, list | tuple):
        items = [_plain(item, budget, depth + 1) for item in value]
        return _TOO_MUCH if any(item is _TOO_MUCH for item in items) else items
    if isinstance(value, dict):
        items = {
            key: _plain(item, budget, depth + 1)
            for key, item in value.items()
            if isinstance(key, str | int)
        }
        return _TOO_MUCH if any(item is _TOO_MUCH for item in items.values()) else items
    return _TOO_MUCH


def _kind(value: Any) -> str:
    if isinstance(value, TensorSource):
        return "a single tensor"
    return f"a {type(value).__name__}"
