"""Reading of small image files from one folder per class, in a folder or archive per split."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from senet_transfer.data.cifar.archives import open_tar, read_member
from senet_transfer.data.cifar.in_memory import SIDE, SPLITS, ImageArrays
from senet_transfer.data.images.class_names import check_encoding, match_names, sort_by_name
from senet_transfer.data.images.decode import (
    AS_STORED,
    BrokenImageError,
    Reading,
    decode_exact,
)
from senet_transfer.data.images.file_types import is_hidden, is_image_name
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
        quiet: Do not show progress bars.

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
        classes: Class names in label order, which must include every class folder. None to use the
            sorted names of the class folders.
        reading: Settings for reading the images.
        quiet: Do not show a progress bar.

    Raises:
        UserError: If there are no images, or an image cannot be read or has the wrong size.
    """
    files = _in_folder(path) if path.is_dir() else _in_archive(path)
    found = [
        (group, name, _decode(data, reading, f"{path}: {group}/{name}"))
        for group, name, data in progress(files, unit="image", desc=path.name, quiet=quiet)
    ]
    if not found:
        raise UserError(
            f"{path} contains no images in one folder per class; expected image files, such as "
            ".png or .jpg files. Pass the folder that contains the splits."
        )
    found.sort(key=lambda row: row[:2])
    groups = {group for group, _, _ in found}
    check_encoding(groups, path)
    matches = match_names(groups, classes or ())
    if classes is None or len(matches) < len(groups):
        classes = sort_by_name(groups, path)
        matches = match_names(groups, classes)
    label_of = {group: label for label, group in enumerate(classes)}
    images = torch.from_numpy(np.stack([pixels for _, _, pixels in found]))
    labels = torch.tensor([label_of[matches[group]] for group, _, _ in found])
    return ImageArrays(images.permute(0, 3, 1, 2).contiguous(), labels, classes, str(path))


def _in_folder(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for group in (
        entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)
    ):
        for path in group.iterdir():
            if is_image_name(path.name):
                yield group.name, path.name, path.read_bytes()


def _in_archive(path: Path) -> Iterator[tuple[str, str, bytes]]:
    with open_tar(path) as archive:
        for member in archive:
            # The name determines only the class and the order; nothing is extracted to disk.
            name = PurePosixPath(member.name)
            if member.isfile() and is_image_name(member.name):
                yield name.parent.name, name.name, read_member(archive, member, _MAX_BYTES)


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
