"""Functions for reading small images from one folder or archive per split.

Each folder or archive contains one subfolder per class.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from senet_transfer.data.cifar.archives import open_tar, read_member
from senet_transfer.data.cifar.in_memory import SIDE, SPLITS, ImageArrays
from senet_transfer.data.images.decode import (
    AS_STORED,
    BrokenImageError,
    Reading,
    decode_exact,
)
from senet_transfer.data.images.file_types import is_hidden, is_image_name
from senet_transfer.data.images.folders import label_images, open_folder
from senet_transfer.data.images.listing import Images
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress

_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2")

# More than a thousand times the size of a 32x32 image.
_MAX_BYTES = 8 * 2**20


def read_image_splits(folder: Path, *, quiet: bool = False) -> dict[str, ImageArrays] | None:
    """Read the images in a folder with one subfolder or archive per split.

    Args:
        folder: Folder with `train` and `test` subfolders, or archives such as `train.tar.xz` and
            `test.tar.xz`, each with one folder per class.
        quiet: Whether to hide progress bars.

    Returns:
        Dictionary from split name to images, or None if the folder contains no splits.

    Raises:
        UserError: If an image cannot be read or has the wrong size, or the splits have different
            classes.
    """
    paths = {split: split_path(folder, split) for split in SPLITS}
    if not any(paths.values()):
        return None
    splits = {}
    for split, path in paths.items():
        if path is None:
            raise UserError(
                f"{folder} contains no {split} split; expected {split}/ with one folder per "
                f"class, or {split}.tar.xz. Add the missing split."
            )
        splits[split] = read_images(path, quiet=quiet)
    train, test = (set(splits[split].classes) for split in SPLITS)
    if train != test:
        raise UserError(
            f"{folder}: the train and test splits have different classes. Only one of them "
            f"contains {sorted(train ^ test)[:5]}; expected the same class folders in both."
        )
    return splits


def split_path(folder: Path, split: str) -> Path | None:
    """Return the path of a split's folder or archive, or None if neither exists."""
    if (folder / split).is_dir():
        return folder / split
    found = [folder / f"{split}{suffix}" for suffix in _ARCHIVES]
    return next((path for path in found if path.is_file()), None)


def read_images(
    path: Path,
    *,
    classes: list[str] | None = None,
    reading: Reading = AS_STORED,
    quiet: bool = False,
) -> ImageArrays:
    """Read a split's images, sorted by class and file name.

    Args:
        path: Folder or archive with one folder per class.
        classes: Class names in label order; every class folder must be among them. None to use
            the sorted names of the class folders.
        reading: Settings for reading the images.
        quiet: Whether to hide the progress bar.

    Raises:
        UserError: If an image cannot be read or has the wrong size, or the class folders are
            invalid; see :func:`~senet_transfer.data.images.folders.open_folder`.
    """
    listed = open_folder(path, classes) if path.is_dir() else None
    folders: set[str] = set()
    files = _in_archive(path, folders) if listed is None else _in_folder(listed)
    pixels = {}
    for name, data in progress(files, unit="image", desc=path.name, quiet=quiet):
        if name in pixels:
            raise UserError(
                f"{path} contains {name} twice; expected each image once. Create the archive again."
            )
        pixels[name] = _decode(data, reading, f"{path}: {name}")
    if listed is None:
        names, labels, classes = label_images(_by_class(pixels, folders), path, classes)
    else:
        names, labels, classes = list(listed.names), listed.labels, listed.classes
    images = torch.from_numpy(np.stack([pixels[name] for name in names])).permute(0, 3, 1, 2)
    numbers = torch.from_numpy(labels.astype(np.int64))
    paths = [os.path.join(path, name) for name in names]
    return ImageArrays(images.contiguous(), numbers, classes, str(path), paths)


def _in_folder(images: Images) -> Iterator[tuple[str, bytes]]:
    for index, name in enumerate(images.names):
        yield name, images.read(index).data


def _in_archive(path: Path, folders: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield each image's name and content, and add the archive's folder names to ``folders``."""
    with open_tar(path) as archive:
        for member in archive:
            # The name determines only the class and the order; nothing is extracted to disk.
            name = PurePosixPath(member.name).as_posix().lstrip("/")
            # `tar -C train -cf train.tar .` also stores the folder "." itself.
            if member.isdir() and name != "." and not is_hidden(name):
                folders.add(name)
            elif member.isfile() and is_image_name(name):
                yield name, read_member(archive, member, _MAX_BYTES)


def _by_class(names: Iterable[str], folders: set[str]) -> dict[str, list[str]]:
    """Group the images in an archive by class folder.

    Returns:
        Sorted image names, keyed by class folder. Empty class folders are included. The paths of
        the class folders are relative to their common parent folder.
    """
    parents = {name: os.path.dirname(name) for name in names}
    used = set(parents.values())
    common = os.path.commonpath(used) if len(used) > 1 else os.path.dirname("".join(used))
    by_class: dict[str, list[str]] = {}
    for name in sorted(parents):
        by_class.setdefault(parents[name][len(common) :].lstrip("/"), []).append(name)
    upper = {os.path.dirname(folder) for folder in folders | used}
    for folder in folders - upper - used:
        if folder.startswith(f"{common}/" if common else ""):
            by_class[folder[len(common) :].lstrip("/")] = []
    return by_class


def _decode(data: bytes, reading: Reading, where: str) -> np.ndarray:
    try:
        image = decode_exact(data, reading)
    except BrokenImageError as error:
        raise UserError(f"Cannot decode {where} ({error}). Remove or replace it.") from error
    if image.size != (SIDE, SIDE):
        raise UserError(
            f"{where} is {image.width}x{image.height} pixels; expected {SIDE}x{SIDE}. Resize the "
            "images first, or train on the larger images with `senet train` and a folder or "
            "shards."
        )
    return np.asarray(image)
