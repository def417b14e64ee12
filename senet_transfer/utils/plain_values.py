"""What pickles of weights are made of: numpy's arrays and Python's plain containers, rebuilt here.

Each function stands in for the one that a pickle names, with the same arguments; none of numpy's or
Python's own is called on them.
"""

import codecs
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_DIMENSIONS = 16
_KEY_TYPES = (str, bytes, int, float, type(None))


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function in a pickle. It is never looked up in a module."""

    name: str


class TensorSource(ABC):
    """A tensor that is still in its file."""

    __slots__ = ()

    @property
    @abstractmethod
    def is_numeric(self) -> bool: ...

    @property
    @abstractmethod
    def numel(self) -> int: ...

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def tensor(self) -> torch.Tensor:
        """The values, in memory that is not the file's."""


class _DType:
    """A numpy dtype under construction."""

    __slots__ = ("value",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufcSUO]\d{0,9}", code):
            raise ValueError(f"dtype {code!r} is not one that weights have")
        self.value = np.dtype(code)

    def build(self, state: Any) -> None:
        _, byteorder, subdtype, names, fields, size, _, flags = state[:8]
        if subdtype is not None or names is not None or fields is not None:
            raise ValueError("a structured dtype is not one that weights have")
        if size not in (-1, self.value.itemsize) or (flags and self.value.kind in "biufc"):
            raise ValueError(f"dtype {self.value} of {size} bytes, flags {flags}")
        self.value = self.value.newbyteorder(byteorder)


class ArrayRef(TensorSource):
    """A numpy array in a pickle: its values stay in the file's bytes until asked for."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        # What numpy's reconstruction asks to allocate is not allocated: the values follow.
        self.array = np.empty(0, np.float32)

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")

    @property
    def is_numeric(self) -> bool:
        return self.array.dtype.kind in "biufc"

    @property
    def numel(self) -> int:
        return self.array.size

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def tensor(self) -> torch.Tensor:
        native = self.array.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(self.array, dtype=native, order="C", copy=True))


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _DType):
        raise ValueError("an array without a dtype")
    if dtype.value.hasobject:
        raise ValueError("an array of Python objects (dtype object), which can hide anything")
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    shape = tuple(shape)
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"an array of shape {shape}")
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} ({dtype.value}) with {len(raw)} bytes of data")
    return np.frombuffer(raw, dtype.value).reshape(shape, order=order)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: str) -> ArrayRef:
    ref = ArrayRef()
    ref.array = _array(raw, dtype, shape, "F" if order == "F" else "C")
    return ref


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    return _array(raw, dtype, (), "C").item()


def _encode(text: str, codec: str = "latin1") -> bytes:
    # How pickles of protocol 0 to 2 spell bytes. Other codecs have no place in weights.
    if codecs.lookup(codec).name != "iso8859-1":
        raise ValueError(f"text encoded as {codec!r}, where latin1 is expected")
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    # Called with nothing: protocols 0 to 2 have no other way to write b"".
    return b""


def plain_key(value: Any) -> Any:
    # Hashing a deeply nested tuple overflows the C stack: no more than one level.
    parts = value if type(value) is tuple else (value,)
    if not all(isinstance(part, _KEY_TYPES) for part in parts):
        raise ValueError(f"a dictionary key of type {type(value).__name__}")
    return value


def make_dict(items: Any = ()) -> dict:
    pairs = items.items() if isinstance(items, dict) else items
    return {plain_key(key): value for key, value in pairs}


def _default_dict(_factory: Any = None, items: Any = ()) -> dict:
    return make_dict(items)


def make_set(items: Any = ()) -> set:
    return {plain_key(item) for item in items}


PLAIN_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": make_dict,
    "collections.Counter": make_dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": make_set,
    "builtins.frozenset": make_set,
    "builtins.bytes": _empty_bytes,
    "_codecs.encode": _encode,
    "numpy._core.multiarray._reconstruct": ArrayRef,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "numpy.dtype": _DType,
}
# Names that stand for themselves: they may be passed on, and calling them is refused.
PLAIN_NAMES = frozenset({"numpy.ndarray", "builtins.dict", "builtins.list", "builtins.int"})
