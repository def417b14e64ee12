"""The official archives of CIFAR-10 and CIFAR-100, binary and python, packed or unpacked.

Formats and checksums: the data sets' site. The pickles of the python version are read as data: see
:mod:`senet_transfer.utils.safe_pickle`; nothing in them is executed.
"""

import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from senet_transfer.data.cifar.in_memory import SIDE, ImageArrays
from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import load_plain

_PIXELS = 3 * SIDE * SIDE

# What a damaged archive or a failing disk raises.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)

# The largest official file has 155 MB.
_MAX_BYTES = 400 * 2**20


@dataclass(frozen=True)
class Official:
    """One of the four archives.

    Attributes:
        name: the file as its site calls it.
        md5: of that file.
        splits: the files of each split, by name.
        names: the file with the names of the classes.
        labels: bytes of labels before each image in the binary version, of which the last counts;
            0 for the python version.
        key: of the labels in the python version.
        names_key: of the names there.
    """

    name: str
    md5: str
    splits: dict[str, tuple[str, ...]]
    names: str
    labels: int = 0
    key: str = ""
    names_key: str = ""

    @property
    def files(self) -> set[str]:
        """All files that are read."""
        return {self.names, *(name for files in self.splits.values() for name in files)}


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

OFFICIAL = (
    Official(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        {"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        labels=1,
    ),
    Official(
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        {"train": _BATCHES, "test": ("test_batch",)},
        "batches.meta",
        key="labels",
        names_key="label_names",
    ),
    Official(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        labels=2,
    ),
    Official(
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        {"train": ("train",), "test": ("test",)},
        "meta",
        key="fine_labels",
        names_key="fine_label_names",
    ),
)

_COUNTS = {"train": 50_000, "test": 10_000}


def read_official_archive(path: Path, *, verify: bool = True) -> dict[str, ImageArrays] | None:
    """Reads an archive that has an official one's files.

    Args:
        path: a tar archive, compressed or not.
        verify: whether it must be the official archive to the byte.

    Returns:
        The splits by name; None where the archive is of another kind.

    Raises:
        UserError: the archive is not the official one, is damaged, or asks for code to be run.
    """
    files: dict[str, bytes] = {}
    wanted = set().union(*(kind.files for kind in OFFICIAL))
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name not in wanted or not member.isfile():
                    # Other members are of trees of images, of which one may be large.
                    if not files and member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                        return None
                    continue
                if member.size > _MAX_BYTES:
                    raise UserError(
                        f"{path} has a member {name} of {member.size:,} bytes; expected at most "
                        f"{_MAX_BYTES:,}. Download the archive again."
                    )
                files[name] = archive.extractfile(member).read()
    except READ_ERRORS as error:
        raise UserError(_damaged(path, error)) from error
    kind = _kind(set(files))
    if kind is None:
        return None
    if verify:
        found = md5_of(path)
        if found != kind.md5:
            raise UserError(
                f"{path} has the files of {kind.name} and md5 {found}, where the official archive "
                f"has {kind.md5}. Download it again; if it is a data set of your own in the same "
                "form, say so (--any-checksum)."
            )
    return _read(kind, files, str(path), counts=_COUNTS if verify else None)


def read_official_folder(folder: Path, *, verify: bool = True) -> dict[str, ImageArrays] | None:
    """Reads a folder into which an official archive was unpacked; as for an archive.

    ``verify`` checks the number of images here: the site has no checksums of single files.
    """
    inside = (entry for entry in sorted(folder.iterdir()) if entry.is_dir())
    for place in (folder, *inside):
        kind = _kind({entry.name for entry in place.iterdir() if entry.is_file()})
        if kind is not None:
            break
    else:
        return None
    try:
        files = {name: (place / name).read_bytes() for name in kind.files}
    except OSError as error:
        raise UserError(_damaged(place, error)) from error
    return _read(kind, files, str(place), counts=_COUNTS if verify else None)


def md5_of(path: Path) -> str:
    """The checksum that the site states."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _damaged(path: Path, error: BaseException) -> str:
    return (
        f"{path} can't be read to its end ({type(error).__name__}: {error}): it is cut off, "
        "damaged or no archive. Download it again."
    )


def _kind(names: set[str]) -> Official | None:
    return next((kind for kind in OFFICIAL if kind.files <= names), None)


def _read(
    kind: Official, files: dict[str, bytes], origin: str, counts: dict[str, int] | None
) -> dict[str, ImageArrays]:
    if kind.labels:
        text = files[kind.names].decode("utf-8", "replace")
        classes = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        classes = _unpickle(files[kind.names], origin, kind.names).get(kind.names_key)
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(
                f"{origin}: {kind.names} has no list {kind.names_key!r}. Download the data again."
            )
    splits = {}
    for split, names in kind.splits.items():
        parts = [part for name in names for part in _parts(kind, files[name], origin, name)]
        images = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        if counts is not None and len(labels) != counts[split]:
            raise UserError(
                f"{origin} has {len(labels):,} {split} images, where the official data has "
                f"{counts[split]:,}. Download it again."
            )
        splits[split] = ImageArrays(
            torch.from_numpy(images).view(-1, 3, SIDE, SIDE),
            torch.from_numpy(labels),
            classes,
            f"{origin} ({split})",
        )
    return splits


def _parts(
    kind: Official, data: bytes, origin: str, name: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if kind.labels:
        record = kind.labels + _PIXELS
        if not data or len(data) % record:
            raise UserError(
                f"{origin}: {name} has {len(data):,} bytes, expected a multiple of {record:,} (a "
                "label and an image each). It is cut off or damaged; download it again."
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, record)
        # Of CIFAR-100's two labels the second is the fine one.
        yield rows[:, kind.labels :], rows[:, kind.labels - 1].astype(np.int64)
        return
    batch = _unpickle(data, origin, name)
    images, labels = batch.get("data"), batch.get(kind.key)
    array = images if isinstance(images, np.ndarray) else np.empty(0)
    good = isinstance(labels, list) and all(type(label) is int for label in labels)
    if not good or array.dtype != np.uint8 or array.shape != (len(labels), _PIXELS) or not labels:
        found = f"{len(labels)} values" if isinstance(labels, list) else type(labels).__name__
        raise UserError(
            f"{origin}: {name} has images of shape {array.shape} ({array.dtype}) and labels "
            f"({kind.key}) of {found}; expected uint8 images (N, {_PIXELS}) and a list of N "
            "labels. Download the data again."
        )
    yield array, np.array(labels, np.int64)


def _unpickle(data: bytes, origin: str, name: str) -> dict[str, Any]:
    """The dictionary in a pickle, with the keys of Python 2 and 3 alike as text."""
    try:
        value = load_plain(io.BytesIO(data), name)
    except UserError as error:
        raise UserError(
            f"{origin}: {name} is refused: it holds more than arrays, lists and text, and loading "
            f"it could run code. Nothing was run. Get the official archive. ({error})"
        ) from error
    # Any error can come of bytes that are no pickle; none of them is worth telling apart.
    except Exception as error:
        raise UserError(
            f"{origin}: {name} is no readable pickle ({type(error).__name__}: {error}); it is cut "
            "off or damaged. Download the data again."
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{origin}: {name} holds a {type(value).__name__}, expected a dictionary.")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else str(key): _text(item)
        for key, item in value.items()
    }


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [item.decode("latin-1") if isinstance(item, bytes) else item for item in value]
    return value
