"""Lazy tensors, whose values are read from the file only when they are needed."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from senet_transfer.utils.safe_pickle import check_sizes


@dataclass  # unhashable, so it can't be a dictionary key
class Storage:
    """Storage of one or more tensors in a file, which is read on first use."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytearray | torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """Return the values, which are read from the file on the first access."""
        raw = self.read()
        if isinstance(raw, torch.Tensor):
            return raw
        if len(raw) != self.nbytes:
            raise ValueError("the file ends in the middle of a tensor")
        return torch.frombuffer(raw, dtype=self.dtype) if raw else torch.empty(0, dtype=self.dtype)

    def view(self, offset: Any, numel: Any) -> "Storage":
        """Return a slice of this storage that shares its memory."""
        offset, numel = check_sizes((offset, numel))
        if offset + numel > self.numel:
            raise ValueError("a view extends beyond its storage")
        return Storage(self.dtype, numel, lambda: self.values[offset : offset + numel])


class TensorRef:
    """Tensor in a file, defined by a :class:`Storage`, an offset, a shape and strides."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> None:
        self.build((storage, offset, shape, strides))

    def build(self, state: tuple) -> None:
        """Set the storage, offset, shape and strides.

        Raises:
            ValueError: If one of these values is invalid, or the tensor extends beyond the storage.
        """
        storage, offset, shape, strides = state
        if not isinstance(storage, Storage):
            raise ValueError("the storage of a tensor is missing or invalid")
        (offset,), shape, strides = check_sizes((offset,)), check_sizes(shape), check_sizes(strides)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise ValueError(
                f"a tensor of shape {shape} exceeds its storage of {storage.numel} values"
            )
        self._storage, self._offset, self._shape, self._strides = storage, offset, shape, strides

    @property
    def size(self) -> int:
        """Return the number of elements, like ``numpy.ndarray.size``."""
        return math.prod(self._shape)

    @property
    def nbytes(self) -> int:
        return self.size * self._storage.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        if self.size == 0:
            return torch.empty(self._shape, dtype=self._storage.dtype)
        view = self._storage.values.as_strided(
            self._shape, self._strides, self._storage.values.storage_offset() + self._offset
        )
        # Tied tensors share memory, as they did in the saved model.
        if view.nbytes == view.untyped_storage().nbytes() and view.is_contiguous():
            return view
        return view.clone(memory_format=torch.contiguous_format)


def is_numeric(value: Any) -> bool:
    """Return whether a value is a lazy tensor or an array with a dtype that PyTorch supports."""
    if not isinstance(value, np.ndarray):
        return isinstance(value, TensorRef)
    # The limit on the item size excludes numpy.longdouble.
    return value.dtype.kind in "biufc" and value.real.itemsize <= 8


def to_tensor(source: TensorRef | np.ndarray) -> torch.Tensor:
    """Convert a lazy tensor or an array to a tensor that does not share memory with the file."""
    if isinstance(source, TensorRef):
        return source.tensor()
    return torch.from_numpy(np.array(source, dtype=source.dtype.newbyteorder("="), order="C"))
