"""Reader for ``torch.save``'s three formats: zip (since 1.6), legacy, and tar (before 0.1.12).

A state dict consists of dense tensors in plain containers. Unlike with
``torch.load(weights_only=True)``, a file may also contain objects of other classes, which are
skipped without running their code. ``torch.load(weights_only=True)`` is not used, because it is not
safe for damaged or hostile files:

- it does not verify zip checksums, so a flipped byte results in a wrong weight;
- it accepts a tensor larger than its storage, and fills the rest with uninitialised memory;
- it does not limit the memory and time of unpickling;
- it can't read the tar format, some Python 2 pickles, or files with objects of other classes.
"""

import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import (
    MAX_DIMENSIONS,
    PLAIN,
    Named,
    Placeholder,
    check_sizes,
    length_of,
    load_plain,
)
from senet_transfer.utils.text import shown
from senet_transfer.weights.formats.lazy_tensor import Storage, TensorRef
from senet_transfer.weights.formats.state_dict import Checkpoint, collect
from senet_transfer.weights.formats.tensor_names import Wanted

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK = 2**22
# Files in archives written by torch.export, in the current and the first format.
_EXPORTED = ("archive_format", "serialized_exported_program.json")

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
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    # Quantized tensors are not read. Only their size in bytes is needed.
    "QInt32": torch.int32,
    **dict.fromkeys(("QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), torch.uint8),
}


# Dtypes that only occur with untyped storages, in _rebuild_tensor_v3.
_UNTYPED = (
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


# Functions that move tensors from the CPU to another device, such as a TPU.
_ON_A_DEVICE = (
    "device_tensor_from_cpu_tensor",
    "device_tensor_from_numpy",
    "xla_tensor",
    "mlc_tensor",
)
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


def _untyped_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> TensorRef:
    """Return a tensor whose dtype is specified separately from its untyped storage."""
    dtype = dtype.value if isinstance(dtype, Named) else None
    if not (isinstance(storage, Storage) and storage.dtype == torch.uint8):
        raise ValueError("a tensor's storage is not an untyped storage")
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no dtype")
    numel = storage.numel // dtype.itemsize
    nbytes = numel * dtype.itemsize
    values = Storage(dtype, numel, lambda: storage.values[:nbytes].view(dtype))
    return TensorRef(values, offset, shape, strides)


def _device(*parts: Any) -> str:
    """Return a device as a string, such as "cuda:0".

    No ``torch.device`` is created, because this version of torch may not support the device type.
    """
    if not all(type(part) in (str, int) for part in parts):
        raise ValueError("a device is neither a string nor an index")
    return ":".join(map(str, parts))


def _unchanged(data: Any, *_: Any) -> Any:
    """Return ``data`` unchanged.

    This function replaces functions that wrap tensors, such as ``_rebuild_parameter``.
    """
    return data


# Functions that can create a tensor with extra attributes. Other functions are not called, because
# the unpickler only limits the size of the arguments of its own calls.
_BUILDERS = (TensorRef, _untyped_tensor, _unchanged)


def _subclass(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """Rebuild a tensor that was saved with extra Python attributes, but without these attributes.

    Return a placeholder if the tensor's class, or the function that builds it, is not supported.
    """
    known = isinstance(kind, Placeholder) and kind.name in _CLASSES
    if known and isinstance(function, Named) and function.value in _BUILDERS:
        return function(*arguments)
    return Placeholder("torch._tensor._rebuild_from_type_v2")


def _empty_tensor() -> TensorRef:
    # Stand-in for torch.FloatTensor(). Old pickles create it empty and fill it with BUILD.
    return TensorRef(Storage(torch.float32, 0, bytearray), 0, (0,), (1,))


# Stand-ins by name in a pickle. A storage class is represented by its dtype.
ALLOWED: Mapping[str, Any] = {
    **PLAIN,
    **{f"{m}.{n}Storage": d for n, d in _DTYPES.items() for m in ("torch", "torch.cuda")},
    **{f"{m}.{n}Tensor": _empty_tensor for n in _DTYPES for m in ("torch", "torch.cuda")},
    "torch.storage.UntypedStorage": torch.uint8,
    **{str(dtype): dtype for dtype in (*_DTYPES.values(), *_UNTYPED)},
    "torch._utils._rebuild_tensor": TensorRef,
    "torch._utils._rebuild_tensor_v2": TensorRef,
    "torch._utils._rebuild_tensor_v3": _untyped_tensor,
    **{f"torch._utils._rebuild_{kind}": _unchanged for kind in _ON_A_DEVICE},
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_parameter": _unchanged,
    "torch._utils._rebuild_parameter_with_state": _unchanged,
    "torch.Size": lambda shape=(): check_sizes(shape),
    "torch.device": _device,
}


class _Storages(dict[Any, Storage]):
    """Storages in a file, by key. All references to a storage must agree on its dtype and size."""

    def named(self, identity: tuple, read: Callable[[Any, int], bytearray]) -> Storage:
        """Return the storage for a persistent id in the pickle.

        Args:
            identity: The persistent id.
            read: A function that reads the data of a storage, given the storage's key and its
                length in bytes.
        """
        kind, storage_type, key, _, numel = identity
        dtype = storage_type.value if isinstance(storage_type, Named) else None
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) not in (str, int):
            raise ValueError("a persistent id does not refer to tensor data")
        (numel,) = check_sizes((numel,))
        storage = Storage(dtype, numel, lambda: read(key, numel * dtype.itemsize))
        storage = self.setdefault(key, storage)
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise ValueError(f"the storage {shown(key)} is described inconsistently")
        return storage


def read_zip(path: Path, wanted: Wanted) -> Checkpoint:
    """Read a zip file written by ``torch.save``, and verify the checksum of every record.

    Raises:
        UserError: If torch.save did not write the archive, or the model contains objects other than
            tensors and plain containers.
        Exception: If the file is damaged; the type depends on the damage, such as
            zipfile.BadZipFile or ValueError.
    """
    with zipfile.ZipFile(path) as archive:
        root = _check_records(archive, path)
        byteorder = f"{root}/byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise UserError(
                f"{path} was saved on a big-endian machine, which is not supported. Save it again "
                "on a little-endian machine."
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"record {damaged} is damaged (its CRC-32 or header is wrong)")
        storages = _Storages()

        def read_record(key: Any, _nbytes: int) -> bytearray:
            data = bytearray()
            with archive.open(f"{root}/data/{key}") as record:
                while chunk := record.read(_CHUNK):
                    data += chunk
            return data

        def persistent_load(identity: Any) -> Storage:
            storage = storages.named(identity, read_record)
            if archive.getinfo(f"{root}/data/{identity[2]}").file_size != storage.nbytes:
                raise ValueError(
                    f"record data/{identity[2]} does not contain the expected {storage.nbytes} "
                    "bytes"
                )
            return storage

        stream = io.BytesIO(archive.read(f"{root}/data.pkl"))
        tree = load_plain(stream, path, ALLOWED, persistent_load)
        return collect(tree, path, path.stat().st_size, wanted)


def _check_records(archive: zipfile.ZipFile, path: Path) -> str:
    """Check that a zip file was written by torch.save, and return the folder of its records."""
    records, names = archive.infolist(), archive.namelist()
    root = next((n.removesuffix("/data.pkl") for n in names if n.endswith("/data.pkl")), None)
    if any(PurePosixPath(name).name in _EXPORTED for name in names):
        raise UserError(
            f"{path} is a torch.export program, not a weight file. Save its tensors: "
            f'torch.save(torch.export.load("{path.name}").state_dict, "weights.pth").'
        )
    if root is None and names and all(name.endswith(".npy") for name in names):
        raise UserError(
            f"{path} is a numpy archive (.npz) that was not written by torch.save. Save its "
            f'arrays: torch.save({{name: torch.from_numpy(array) for name, array in numpy.load("'
            f'{path.name}").items()}}, "weights.pth").'
        )
    if root is None:
        raise UserError(
            f"{path} is a zip archive that was not written by torch.save (it contains "
            f"{shown(', '.join(names[:4])) or 'nothing'}). If it contains the weights, unpack it "
            "first."
        )
    if f"{root}/constants.pkl" in names:
        raise UserError(
            f"{path} is a TorchScript program, not a weight file. Save its tensors: "
            'torch.save(torch.jit.load("file").state_dict(), "weights.pth").'
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in records):
        raise UserError(
            f"{path} is a zip file with compression; expected a zip file without compression, as "
            "written by torch.save. Use the original file."
        )
    if any(info.compress_size != info.file_size for info in records):
        raise ValueError("the compressed and uncompressed sizes of an uncompressed record differ")
    if sum(info.file_size for info in records) > path.stat().st_size:
        raise ValueError("the records are larger than the file")
    if len(set(names)) != len(names):
        raise ValueError("two records have the same name")
    return root


def read_legacy(stream: io.BytesIO, path: Path, wanted: Wanted) -> Checkpoint:
    """Read a stream in the legacy format of ``torch.save``, positioned after the magic number."""
    if load_plain(stream, path) != 1001:
        raise ValueError("expected protocol version 1001 of torch.save's legacy format")
    if load_plain(stream, path).get("little_endian") is not True:
        raise UserError(
            f"{path} was saved on a big-endian machine, which is not supported. Save it again on a "
            "little-endian machine."
        )
    storages = _Storages()
    starts: dict[Any, int] = {}

    def persistent_load(identity: Any) -> Any:
        if identity[0] == "module":  # a torch.nn.Module class with its source code
            return identity[1]
        *identity, view = (*identity, None)[:6]
        storage = storages.named(identity, lambda key, n: _raw(stream, starts[key], n))
        return storage if view is None else storage.view(*view[1:])

    tree = load_plain(stream, path, ALLOWED, persistent_load)
    keys = load_plain(stream, path)
    if not all(type(key) in (str, int) for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("the list of storages differs from the storages of the tensors")
    for key in keys:
        starts[key] = _skip_data(stream, storages[key])
    return collect(tree, path, length_of(stream), wanted)


def read_tar(path: Path, wanted: Wanted) -> Checkpoint:
    """Read a tar archive, the oldest format of ``torch.save``.

    The archive contains the files ``storages``, ``tensors`` and ``pickle``.
    """
    with tarfile.open(path, mode="r:") as tar:
        members = {member.name: member for member in tar.getmembers()}
        if not {"storages", "tensors", "pickle"} <= members.keys():
            names = shown(", ".join(list(members)[:4])) or "nothing"
            raise UserError(
                f"{path} is a tar archive that was not written by torch.save (it contains "
                f"{names}). If it contains the weights, unpack it first."
            )
        parts = {}
        for name in ("storages", "tensors", "pickle"):
            member = tar.extractfile(members[name])
            # A sparse member can claim any size, whereas the data of a regular member must be in
            # the file.
            if member is None or not members[name].isreg() or members[name].issparse():
                raise ValueError(f"its member {name} is not a regular file")
            parts[name] = io.BytesIO(member.read())
    storages = _tar_storages(parts["storages"], path)
    tensors = _tar_tensors(parts["tensors"], path, storages)

    def persistent_load(identity: Any) -> Any:
        # A tuple is a torch.nn.Module class with its source code.
        return identity[0] if isinstance(identity, tuple) else tensors[int(identity)]

    tree = load_plain(parts["pickle"], path, ALLOWED, persistent_load)
    return collect(tree, path, path.stat().st_size, wanted)


def _tar_storages(stream: io.BytesIO, path: Path) -> dict[int, Storage]:
    storages = _Storages()
    starts: dict[Any, int] = {}
    for _ in range(load_plain(stream, path)):
        key, location, storage_type = load_plain(stream, path, ALLOWED)
        place = stream.tell()
        (numel,) = struct.unpack("<q", stream.read(8))
        identity = ("storage", storage_type, key, location, numel)
        storage = storages.named(identity, lambda key, n: _raw(stream, starts[key], n))
        stream.seek(place)
        starts[key] = _skip_data(stream, storage)
    for key, root, offset, numel in load_plain(stream, path):
        storages[int(key)] = storages[int(root)].view(offset, numel)
    return storages


def _tar_tensors(
    stream: io.BytesIO, path: Path, storages: dict[int, Storage]
) -> dict[int, TensorRef]:
    tensors = {}
    for _ in range(load_plain(stream, path)):
        key, storage, _kind = load_plain(stream, path, ALLOWED)
        (dimensions,) = struct.unpack("<q", stream.read(8))
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(
                f"a tensor has {dimensions} dimensions; expected at most {MAX_DIMENSIONS}"
            )
        *numbers, offset = struct.unpack(
            f"<{2 * dimensions + 1}q", stream.read(16 * dimensions + 8)
        )
        shape, strides = numbers[:dimensions], numbers[dimensions:]
        tensors[int(key)] = TensorRef(storages[int(storage)], offset, shape, strides)
    return tensors


def _raw(stream: io.BytesIO, start: int, nbytes: int) -> bytearray:
    stream.seek(start)
    return bytearray(stream.read(nbytes))


def _skip_data(stream: io.BytesIO, storage: Storage) -> int:
    """Check the length of a storage's data, skip the data, and return its offset in the stream."""
    if struct.unpack("<q", stream.read(8)) != (storage.numel,):
        raise ValueError("the data of a tensor does not have the expected length")
    start = stream.tell()
    if stream.seek(start + storage.nbytes) > length_of(stream):
        raise ValueError("the file ends in the middle of a tensor")
    return start
