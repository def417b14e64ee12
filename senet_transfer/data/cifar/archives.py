"""Functions for downloading and reading the official CIFAR-10 and CIFAR-100 distributions.

The Python and binary versions are supported, as archives or unpacked folders.

torchvision downloads the Python version and provides its file names and checksums. Other data in
the same format is also supported and may be untrusted, so pickles are always loaded with
:mod:`senet_transfer.utils.safe_pickle`, which does not execute code.
"""

import hashlib
import io
import logging
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5

from senet_transfer.data.cifar.in_memory import SIDE, ImageArrays
from senet_transfer.data.images.file_types import is_image_name
from senet_transfer.data.images.listing import walk
from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import load_plain

logger = logging.getLogger(__name__)

DOWNLOADS = {"cifar10": CIFAR10, "cifar100": CIFAR100}

IMAGE_COUNTS = {"train": 50_000, "test": 10_000}

_PIXELS = 3 * SIDE * SIDE

# The largest official file is 155 MB.
_MAX_BYTES = 400 * 2**20

_REMEDY = (
    "Download it again. For your own data in the same format, run `senet data cifar` with "
    "--any-checksum."
)


@dataclass(frozen=True)
class BinaryVersion:
    """File names and checksums of CIFAR's binary version.

    The attribute names match those of torchvision's CIFAR classes. In the binary files, each image
    is preceded by ``meta["label_bytes"]`` bytes, the last of which is the label.
    """

    filename: str
    tgz_md5: str
    train_list: list[tuple[str, str | None]]
    test_list: list[tuple[str, str | None]]
    meta: dict[str, Any]


FORMS: tuple[type[CIFAR10] | BinaryVersion, ...] = (
    CIFAR10,
    CIFAR100,
    BinaryVersion(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        [(f"data_batch_{number}.bin", None) for number in range(1, 6)],
        [("test_batch.bin", None)],
        {"filename": "batches.meta.txt", "md5": None, "label_bytes": 1},
    ),
    BinaryVersion(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        [("train.bin", None)],
        [("test.bin", None)],
        {"filename": "fine_label_names.txt", "md5": None, "label_bytes": 2},
    ),
)


def download_cifar(name: str, root: Path) -> Path:
    """Download CIFAR's official "python version" with torchvision, which verifies and unpacks it.

    Args:
        name: Key in :data:`DOWNLOADS`.
        root: Folder for the archive and the unpacked files. Existing files with valid checksums are
            kept.

    Returns:
        The folder with the unpacked files.

    Raises:
        UserError: If the data cannot be downloaded or written, or its checksum is wrong.
    """
    dataset = DOWNLOADS[name]
    try:
        dataset(root, download=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"Cannot download {dataset.url} to {root} ({type(error).__name__}: {error}). Remove "
            f"{root / dataset.base_folder} if it exists and try again, or obtain "
            f"{dataset.filename} in a different way and pass it with --source."
        ) from error
    return root / dataset.base_folder


def read_official(path: Path, *, verify: bool = True) -> dict[str, ImageArrays] | None:
    """Read an official distribution from an archive or folder.

    Args:
        path: Tar archive (compressed or uncompressed), an unpacked archive, or the parent folder of
            an unpacked archive.
        verify: Whether to raise an error if an archive's checksum or the number of images differs
            from the official distribution.

    Returns:
        Dictionary from split name to images, or None if the archive or folder contains other files.

    Raises:
        UserError: If the data is damaged, fails verification, or contains a pickle that could
            execute code.
    """
    files = _read_folder(path) if path.is_dir() else _read_archive(path)
    form = _match(files)
    if form is None:
        return None
    if verify:
        _verify_checksums(form, path, files)
    classes = _classes(form.meta, files[form.meta["filename"]], f"{path}: {form.meta['filename']}")
    splits = {}
    for split, listed in (("train", form.train_list), ("test", form.test_list)):
        batches = [_batch(form.meta, files[name], f"{path}: {name}") for name, _ in listed]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        if verify and len(labels) != IMAGE_COUNTS[split]:
            raise UserError(
                f"{path} contains {len(labels):,} {split} images; expected "
                f"{IMAGE_COUNTS[split]:,}, as in the official data. {_REMEDY}"
            )
        splits[split] = ImageArrays(
            torch.from_numpy(images).view(-1, 3, SIDE, SIDE),
            torch.from_numpy(labels),
            classes,
            f"{path} ({split})",
        )
    return splits


def _verify_checksums(
    form: type[CIFAR10] | BinaryVersion, path: Path, files: dict[str, bytes]
) -> None:
    """Verify the MD5 checksums of official files.

    If a checksum is wrong, raise an error for an archive, but only log a warning for unpacked
    files.
    """
    if path.is_file():
        if (md5 := calculate_md5(path)) != form.tgz_md5:
            raise UserError(
                f"{path} contains the files of {form.filename}, but its MD5 checksum is {md5}; "
                f"expected {form.tgz_md5}, the checksum of the official archive. {_REMEDY}"
            )
        return
    for name, md5 in _checksums(form).items():
        if md5 not in (None, hashlib.md5(files[name], usedforsecurity=False).hexdigest()):
            logger.warning(
                "%s: the MD5 checksum of %s differs from that of the official file", path, name
            )


def _checksums(form: type[CIFAR10] | BinaryVersion) -> dict[str, str | None]:
    """Return the official MD5 checksums of the required files, keyed by file name.

    Unknown checksums are None.
    """
    return dict([*form.train_list, *form.test_list, (form.meta["filename"], form.meta["md5"])])


def _match(names: Iterable[str]) -> type[CIFAR10] | BinaryVersion | None:
    names = set(names)
    return next((form for form in FORMS if names.issuperset(_checksums(form))), None)


def _read_folder(path: Path) -> dict[str, bytes]:
    """Read the official files in a folder or one of its subfolders.

    Returns:
        Dictionary from file name to content; empty if there are no official files.
    """
    _, subfolders, _ = next(walk(path))
    for folder in (path, *(path / name for name in subfolders)):
        _, _, files = next(walk(folder))
        form = _match(files)
        if form is not None:
            break
    else:
        return {}
    try:
        return {name: (folder / name).read_bytes() for name in _checksums(form)}
    except OSError as error:
        raise UserError(
            f"Cannot read {folder} ({type(error).__name__}: {error}). Check its files, or unpack "
            "the archive again."
        ) from error


def _read_archive(path: Path) -> dict[str, bytes]:
    """Read the official files in a tar archive.

    Returns:
        Dictionary from file name to content; empty if there are no official files.
    """
    wanted = {name for form in FORMS for name in _checksums(form)}
    files: dict[str, bytes] = {}
    with open_tar(path) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in wanted and member.isfile():
                files[name] = read_member(archive, member, _MAX_BYTES)
            elif not files and is_image_name(name):
                break  # an archive of images; it may be large, so it is not read to the end
    return files


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, and convert errors inside the context to :class:`UserError`."""
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(
            f"Cannot read {path} ({type(error).__name__}: {error}): it is truncated, damaged or "
            "not a tar archive. Download it again."
        ) from error


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> bytes:
    """Read a regular file in an archive.

    Raises:
        UserError: If the member is not a regular file, or is larger than ``max_bytes`` bytes.
    """
    if member.size > max_bytes:
        raise UserError(
            f"{archive.name!s}: {member.name} is {member.size:,} bytes; expected at most "
            f"{max_bytes:,}. Check that this is the right archive."
        )
    file = archive.extractfile(member)
    if file is None:
        raise UserError(
            f"{archive.name!s}: {member.name} is not a regular file. Download the archive again."
        )
    return file.read()


def _classes(meta: dict[str, Any], data: bytes, where: str) -> list[str]:
    if "label_bytes" in meta:
        lines = data.decode("utf-8", "replace").splitlines()
        return [line.strip() for line in lines if line.strip()]
    classes = _load_pickle(data, where).get(meta["key"])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(
            f"{where} does not contain the list {meta['key']!r}. Download the data again."
        )
    return classes


def _batch(meta: dict[str, Any], data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Parse a CIFAR batch file into images, uint8 `(N, 3072)`, and labels, int64 `(N,)`."""
    if before := meta.get("label_bytes"):
        record = before + _PIXELS
        if not data or len(data) % record:
            raise UserError(
                f"{where} is {len(data):,} bytes; expected a multiple of {record:,}, the size of "
                "a label and an image. The file is truncated or damaged. Download it again."
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, record)
        # CIFAR-100 has two labels per image; the second is the fine label.
        return rows[:, before:], rows[:, before - 1].astype(np.int64)
    batch = _load_pickle(data, where)
    images, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
    array = images if isinstance(images, np.ndarray) else np.empty(0)
    if not (
        isinstance(labels, list)
        and labels
        and all(type(label) is int and 0 <= label < 2**31 for label in labels)
        and array.dtype == np.uint8
        and array.shape == (len(labels), _PIXELS)
    ):
        found = f"{len(labels)} values" if isinstance(labels, list) else type(labels).__name__
        raise UserError(
            f"{where} contains images of shape {array.shape} ({array.dtype}) and labels "
            f"({found}); expected uint8 images of shape (N, {_PIXELS}) and a list of N labels. "
            "Download the data again."
        )
    return array, np.array(labels, np.int64)


def _load_pickle(data: bytes, where: str) -> dict[str, Any]:
    """Load a dictionary from a Python 2 or 3 pickle, converting keys and list items to `str`."""
    try:
        value = load_plain(io.BytesIO(data), where)
    except UserError as error:
        raise UserError(
            f"{where} was rejected: it contains objects other than arrays, lists and text, and "
            "loading it could execute code. No code was executed. Download the official archive. "
            f"({error})"
        ) from error
    except Exception as error:  # damaged bytes raise errors of many types
        raise UserError(
            f"Cannot unpickle {where} ({type(error).__name__}: {error}): it is truncated or "
            "damaged. Download the data again."
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{where} contains a {type(value).__name__}; expected a dictionary. Download the data "
            "again."
        )
    return {
        str(_text(key)): [_text(item) for item in value] if isinstance(value, list) else value
        for key, value in value.items()
    }


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value
