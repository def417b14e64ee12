"""Small images as files in one folder per class, with a folder or an archive for each split."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from senet_transfer.data.cifar.archives import open_tar, read_member
from senet_transfer.data.cifar.in_memory import SIDE, SPLITS, ImageArrays
from senet_transfer.data.images.decode import BrokenImageError, decode_exact
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2")

# Some thousand times the size of a 32x32 image.
_MAX_BYTES = 8 * 2**20


def read_image_splits(folder: Path, *, quiet: bool = False) -> dict[str, ImageArrays] | None:
    """Read a folder that has a folder or an archive for each split.

    Args:
        folder: Holds `train` and `test`, or `train.tar.xz` and `test.tar.xz`, or other archives,
            with one folder per class in each.
        quiet: Show no progress bars.

    Returns:
        The splits by name, or None for a folder without splits.

    Raises:
        UserError: If an image can't be read or has another size, or the classes of the splits
            differ.
    """
    paths = {split: split_path(folder, split) for split in SPLITS}
    if not any(paths.values()):
        return None
    splits = {}
    for split, path in paths.items():
        if path is None:
            raise UserError(
                f"{folder} has no {split} split; expected {split}/ with one folder per class, or "
                f"{split}.tar.xz. Put it there."
            )
        splits[split] = read_images(path, quiet=quiet)
    train, test = (set(splits[split].classes) for split in SPLITS)
    if train != test:
        raise UserError(
            f"{folder}: the classes of the splits differ: only one of them has "
            f"{sorted(train ^ test)[:5]}. Both need a folder for each class."
        )
    return splits


def split_path(folder: Path, split: str) -> Path | None:
    """Return the folder or archive of a split, or None if there is none."""
    if (folder / split).is_dir():
        return folder / split
    found = [folder / f"{split}{suffix}" for suffix in _ARCHIVES]
    return next((path for path in found if path.is_file()), None)


def read_images(path: Path, *, quiet: bool = False) -> ImageArrays:
    """Read the images of one split, sorted by class and file name.

    Args:
        path: Folder or archive with one folder per class.
        quiet: Show no progress bar.

    Raises:
        UserError: If there are no images, or one can't be read or has another size.
    """
    files = _in_folder(path) if path.is_dir() else _in_archive(path)
    found = [
        (group, name, _decode(data, f"{path}: {group}/{name}"))
        for group, name, data in progress(files, unit="image", desc=path.name, quiet=quiet)
    ]
    if not found:
        raise UserError(
            f"{path} contains no images ({', '.join(SUFFIXES)}) in one folder per class. Name the "
            "parent folder of the splits."
        )
    found.sort(key=lambda row: row[:2])
    classes = sorted({group for group, _, _ in found})
    label_of = {group: label for label, group in enumerate(classes)}
    images = torch.from_numpy(np.stack([pixels for _, _, pixels in found]))
    labels = torch.tensor([label_of[group] for group, _, _ in found])
    return ImageArrays(images.permute(0, 3, 1, 2).contiguous(), labels, classes, str(path))


def _in_folder(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for group in (entry for entry in folder.iterdir() if entry.is_dir()):
        for path in group.iterdir():
            if path.suffix.lower() in SUFFIXES:
                yield group.name, path.name, path.read_bytes()


def _in_archive(path: Path) -> Iterator[tuple[str, str, bytes]]:
    with open_tar(path) as archive:
        for member in archive:
            # The name only determines the class and the order; nothing is extracted to disk.
            name = PurePosixPath(member.name)
            if member.isfile() and name.suffix.lower() in SUFFIXES:
                yield name.parent.name, name.name, read_member(archive, member, _MAX_BYTES)


def _decode(data: bytes, where: str) -> np.ndarray:
    try:
        image = decode_exact(data)
    except BrokenImageError as error:
        raise UserError(f"{where} can't be decoded ({error}). Remove or replace it.") from error
    if image.size != (SIDE, SIDE):
        raise UserError(
            f"{where} has {image.width}x{image.height} pixels; expected {SIDE}x{SIDE}. Resize the "
            "images first. For larger images, use tools/train_net.py with a folder or shards."
        )
    return np.asarray(image)
