"""Files of ``torch.save``, in its three formats: zip (since 1.6), legacy, and tar (before 0.1.12).

Read here instead of by ``torch.load(weights_only=True)``, and agreeing with it on what it saves,
because on a damaged or hostile file that one

- does not verify the zip's checksums: a flipped byte loads as a wrong weight;
- lets a tensor be larger than its storage, and fills the rest with uninitialised memory;
- can't read the tar format and some of Python 2's pickles.

No more is admitted than ``weights_only=True`` admits: dense tensors and plain containers.
"""

import io
import math
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.plain_values import (
    MAX_DIMENSIONS,
    PLAIN_FUNCTIONS,
    PLAIN_NAMES,
    Global,
    TensorSource,
)
from senet_transfer.utils.safe_pickle import PlainUnpickler, length_of
from senet_transfer.weights.formats.refusal import shown
from senet_transfer.weights.formats.state_dict import Checkpoint, collect

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK = 2**22

_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_STORAGES = {
    f"{module}.{name}Storage": dtype
    for name, dtype in _DTYPES.items()
    for module in ("torch", "torch.cuda")
}
_TENSORS = [f"{module}.{name}Tensor" for name in _DTYPES for module in ("torch", "torch.cuda")]
_DTYPE_NAMES = {str(dtype) for dtype in _DTYPES.values()}


@dataclass
class Storage:
    """A run of numbers in the file, read when a tensor of the model needs it."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytearray]
    offset: int = 0
    _values: list[torch.Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def values(self) -> torch.Tensor:
        if not self._values:
            raw = self.read()
            end = self.offset * self.dtype.itemsize + self.nbytes
            if len(raw) < end:
                raise ValueError("a tensor's data is shorter than its shape")
            empty = torch.empty(0, dtype=self.dtype)
            whole = torch.frombuffer(raw, dtype=self.dtype) if len(raw) else empty
            self._values.append(whole[self.offset : self.offset + self.numel])
        return self._values[0]


class TensorRef(TensorSource):
    """A tensor in a file: a view of a :class:`Storage`, checked to lie inside it."""

    __slots__ = ("_offset", "_shape", "_storage", "_strides")

    is_numeric = True

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> None:
        self.build((storage, offset, shape, strides))

    def build(self, state: Any) -> None:
        storage, offset, shape, strides = state
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        numbers = (offset, *shape, *strides)
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
            raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {len(shape)} dimensions")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise ValueError(f"a tensor of shape {tuple(shape)} in {storage.numel} numbers of data")
        self._storage, self._offset = storage, offset
        self._shape, self._strides = tuple(shape), tuple(strides)

    @property
    def numel(self) -> int:
        return math.prod(self._shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self._storage.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        # Tied tensors share their memory, as they did in the model that was saved.
        if self.numel == 0:
            return torch.empty(self._shape, dtype=self._storage.dtype)
        view = self._storage.values().as_strided(self._shape, self._strides, self._offset)
        if self.numel == self._storage.numel and view.is_contiguous():
            return view
        return view.clone(memory_format=torch.contiguous_format)


class _EmptyTensor(TensorRef):
    """``torch.FloatTensor()``, which old pickles create first and fill by its state."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Storage(torch.float32, 0, bytearray), 0, (0,), (1,))


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **PLAIN_FUNCTIONS,
    "torch._utils._rebuild_tensor": TensorRef,
    "torch._utils._rebuild_tensor_v2": TensorRef,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": lambda shape=(): tuple(shape),
    "torch.device": lambda *where: ":".join(str(part) for part in where[:2]),
    **dict.fromkeys(_TENSORS, _EmptyTensor),
}
NAMES = PLAIN_NAMES | _STORAGES.keys() | _DTYPE_NAMES


def read_zip(path: Path) -> Checkpoint:
    """Reads a zip file of ``torch.save``, and verifies the checksum of every record in it.

    Raises:
        UserError: it is another kind of archive, or not of tensors and plain containers.
        zipfile.BadZipFile, ValueError, and other errors of reading: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = _check_records(archive, path)
        byteorder = f"{root}/byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise UserError(f"{path}: saved on a big-endian machine; save it on a common one.")
        storages: dict[str, Storage] = {}

        def persistent_load(identity: Any) -> Storage:
            kind, storage_type, key, _, numel = identity
            dtype = _storage_dtype(kind, storage_type, numel)
            if key not in storages:
                info = archive.getinfo(f"{root}/data/{key}")
                storages[key] = Storage(dtype, numel, lambda: _read(archive, info))
                if info.file_size != storages[key].nbytes:
                    raise ValueError(f"record {info.filename} is not {storages[key].nbytes} bytes")
            if (storages[key].dtype, storages[key].numel) != (dtype, numel):
                raise ValueError(f"record data/{key} is described in two ways")
            return storages[key]

        stream = io.BytesIO(archive.read(f"{root}/data.pkl"))
        tree = _unpickler(stream, path, persistent_load).load()
        checkpoint = collect(tree, path, path.stat().st_size)
        used = {f"{root}/data/{key}" for key, s in storages.items() if s._values}
        for info in archive.infolist():
            if info.filename not in used:  # the others were verified as they were read
                _verify(archive, info)
    return checkpoint


def _check_records(archive: zipfile.ZipFile, path: Path) -> str:
    """The folder that everything in the archive is in, once it is found to be torch's."""
    names = archive.namelist()
    root = next((n.removesuffix("/data.pkl") for n in names if n.endswith("/data.pkl")), None)
    if root is None:
        raise UserError(
            f"{path}: a zip archive, but not one of torch.save (it holds "
            f"{shown(', '.join(names[:4])) or 'nothing'}). If the weights are inside, unpack it "
            "first."
        )
    if f"{root}/constants.pkl" in names:
        raise UserError(
            f"{path}: a TorchScript program, not weights. Save its tensors: "
            'torch.save(torch.jit.load("file").state_dict(), "weights.pth").'
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UserError(f"{path}: packed anew with compression, which torch.save does not do.")
    if any(info.compress_size != info.file_size for info in archive.infolist()):
        raise ValueError("a record of two sizes")
    if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
        raise ValueError("records that are larger than the file")
    if len(set(names)) != len(names):
        raise ValueError("two records of one name")
    return root


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytearray:
    """Reads a record; at its end, zipfile verifies its checksum."""
    data = bytearray(info.file_size)
    with archive.open(info) as record:
        filled = 0
        while chunk := record.read(_CHUNK):
            data[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
    if filled != info.file_size:
        raise ValueError(f"record {info.filename} is cut short")
    return data


def _verify(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    with archive.open(info) as record:
        while record.read(_CHUNK):
            pass


def read_legacy(stream: io.BytesIO, path: Path) -> Checkpoint:
    """Reads what follows the magic number of torch's legacy format: pickles, then raw data."""
    if PlainUnpickler(stream, path).load() != 1001:
        raise ValueError("another version of the legacy format than 1001")
    if PlainUnpickler(stream, path).load().get("little_endian") is not True:
        raise UserError(f"{path}: saved on a big-endian machine; save it on a common one.")
    storages: dict[str, Storage] = {}
    places: dict[str, int] = {}

    def persistent_load(identity: Any) -> Storage:
        kind, storage_type, key, _, numel, view = (*identity, None)[:6]
        dtype = _storage_dtype(kind, storage_type, numel)
        if key not in storages:
            storages[key] = Storage(dtype, numel, lambda: _raw(stream, places[key], dtype, numel))
        if view is None:
            return storages[key]
        _, offset, length = view
        return _view(storages[key], offset, length)

    tree = _unpickler(stream, path, persistent_load).load()
    keys = PlainUnpickler(stream, path).load()
    if set(keys) != storages.keys() or len(keys) != len(storages):
        raise ValueError("the data in it is not that which its tensors need")
    for key in keys:
        places[key] = _skip_raw(stream, storages[key])
    return collect(tree, path, length_of(stream))


def read_tar(path: Path) -> Checkpoint:
    """Reads torch's first format: a tar of ``storages``, ``tensors`` and the ``pickle``."""
    with tarfile.open(path, mode="r:") as tar:
        members = {member.name: member for member in tar.getmembers()}
        if not {"storages", "tensors", "pickle"} <= members.keys():
            names = shown(", ".join(list(members)[:4])) or "nothing"
            raise UserError(
                f"{path}: a tar archive that holds {names}, not one of torch.save. "
                "If the weights are inside, unpack it first."
            )
        parts = {}
        for name in ("storages", "tensors", "pickle"):
            # A sparse member can claim any size; an ordinary one lies in the file as it is.
            if not members[name].isreg() or members[name].issparse():
                raise ValueError(f"{name} in it is not a regular file")
            parts[name] = io.BytesIO(tar.extractfile(members[name]).read())
    storages = _tar_storages(parts["storages"], path)
    tensors = _tar_tensors(parts["tensors"], path, storages)
    unpickler = _unpickler(parts["pickle"], path, lambda identity: tensors[int(identity)])
    return collect(unpickler.load(), path, path.stat().st_size)


def _tar_storages(stream: io.BytesIO, path: Path) -> dict[int, Storage]:
    storages: dict[int, Storage] = {}
    for _ in range(_count(_unpickler(stream, path).load())):
        key, _, storage_type = _unpickler(stream, path).load()
        dtype = _storage_dtype("storage", storage_type, 0)
        numel = _count(int.from_bytes(stream.read(8), "little", signed=True))
        place = stream.tell()
        # Bound now: the loop's variables change before the storage is read.
        read = _reader(stream, place, dtype, numel)
        storages[key] = Storage(dtype, numel, read)
        _advance(stream, storages[key].nbytes)
    for key, root, offset, numel in _unpickler(stream, path).load():
        storages[key] = _view(storages[root], offset, numel)
    return storages


def _tar_tensors(
    stream: io.BytesIO, path: Path, storages: dict[int, Storage]
) -> dict[int, TensorRef]:
    tensors: dict[int, TensorRef] = {}
    for _ in range(_count(_unpickler(stream, path).load())):
        key, storage, _ = _unpickler(stream, path).load()
        dimensions = int.from_bytes(stream.read(8), "little")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        numbers = [
            int.from_bytes(stream.read(8), "little", signed=True) for _ in range(2 * dimensions + 1)
        ]
        shape, strides = numbers[:dimensions], numbers[dimensions : 2 * dimensions]
        tensors[key] = TensorRef(storages[storage], numbers[-1], shape, strides)
    return tensors


def _unpickler(stream: io.BytesIO, path: Path, persistent_load: Any = None) -> PlainUnpickler:
    return PlainUnpickler(
        stream, path, functions=FUNCTIONS, names=NAMES, persistent_load=persistent_load
    )


def _storage_dtype(kind: Any, storage_type: Any, numel: Any) -> torch.dtype:
    if kind != "storage" or not isinstance(storage_type, Global):
        raise ValueError("a reference to something that is not a tensor's data")
    _count(numel)
    return _STORAGES[storage_type.name]


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a count is expected")
    return value


def _view(storage: Storage, offset: Any, numel: Any) -> Storage:
    if _count(offset) + _count(numel) > storage.numel:
        raise ValueError("a view that is larger than its data")
    return replace(storage, numel=numel, offset=storage.offset + offset, _values=[])


def _reader(
    stream: io.BytesIO, place: int, dtype: torch.dtype, numel: int
) -> Callable[[], bytearray]:
    return lambda: _raw(stream, place, dtype, numel)


def _raw(stream: io.BytesIO, place: int, dtype: torch.dtype, numel: int) -> bytearray:
    raw = bytearray(numel * dtype.itemsize)
    stream.seek(place)
    stream.readinto(raw)
    return raw


def _skip_raw(stream: io.BytesIO, storage: Storage) -> int:
    """Passes over a storage's data, checks its length, and returns where it begins."""
    if int.from_bytes(stream.read(8), "little", signed=True) != storage.numel:
        raise ValueError("a tensor's data is not of the length that its tensor states")
    place = stream.tell()
    _advance(stream, storage.nbytes)
    return place


def _advance(stream: io.BytesIO, nbytes: int) -> None:
    end = stream.tell() + nbytes
    if end > length_of(stream):
        raise ValueError("the file ends in the middle of a tensor")
    stream.seek(end)
