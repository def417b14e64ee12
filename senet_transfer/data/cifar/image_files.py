"""Small images as files, a folder a class: as a tree, or as one archive a split."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from senet_transfer.data.cifar.archives import READ_ERRORS
from senet_transfer.data.cifar.in_memory import SIDE, SPLITS, ImageArrays
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2")

# Some thousand times what a 32x32 image takes.
_MAX_BYTES = 8 * 2**20


def read_image_splits(folder: Path, *, quiet: bool = False) -> dict[str, ImageArrays] | None:
    """Reads a folder that has, for each split, a folder or an archive with a folder a class.

    Args:
        folder: holds `train` and `test`, or `train.tar.xz` and `test.tar.xz`, or other archives.
        quiet: no progress bars.

    Returns:
        The splits by name; None where the folder is of another kind.

    Raises:
        UserError: an image that can't be read or has another size, or splits of other classes.
    """
    places = {split: split_place(folder, split) for split in SPLITS}
    if not any(places.values()):
        return None
    missing = [split for split, place in places.items() if place is None]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]} split; expected {missing[0]}/ with a folder a class, or "
            f"{missing[0]}.tar.xz. Put it there."
        )
    splits = {split: read_images(place, quiet=quiet) for split, place in places.items()}
    train, test = (set(splits[split].classes) for split in SPLITS)
    if train != test:
        raise UserError(
            f"{folder}: the splits have other classes: {sorted(train ^ test)[:5]} are in one "
            "alone. Both need a folder for each class."
        )
    return splits


def split_place(folder: Path, split: str) -> Path | None:
    """The folder or archive of a split in a folder of both, if it has one."""
    if (folder / split).is_dir():
        return folder / split
    found = [folder / f"{split}{suffix}" for suffix in _ARCHIVES]
    return next((path for path in found if path.is_file()), None)


def read_images(place: Path, *, quiet: bool = False) -> ImageArrays:
    """Reads one split: a folder or archive with a folder a class, in the order of their names.

    Args:
        place: the folder or archive.
        quiet: no progress bar.

    Raises:
        UserError: there are no images, or one can't be read or has another size.
    """
    found = _in_folder(place) if place.is_dir() else _in_archive(place)
    found = progress(found, unit="image", desc=place.name, quiet=quiet)
    rows = sorted(((group, name, _decode(data, f"{place}: {group}/{name}")) for group, name, data
                   in found), key=lambda row: row[:2])  # fmt: skip
    if not rows:
        raise UserError(
            f"{place} holds no images ({', '.join(SUFFIXES)}) in a folder a class. Name the folder "
            "above those of the splits."
        )
    classes = sorted({group for group, _, _ in rows})
    index = {group: label for label, group in enumerate(classes)}
    images = np.stack([pixels for _, _, pixels in rows])
    labels = torch.tensor([index[group] for group, _, _ in rows])
    return ImageArrays(torch.from_numpy(images), labels, classes, str(place))


def _in_folder(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for group in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for path in sorted(group.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                yield group.name, path.name, path.read_bytes()


def _in_archive(path: Path) -> Iterator[tuple[str, str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                # Names tell the class and the order alone; nothing is unpacked to the disk.
                name = PurePosixPath(member.name)
                if not member.isfile() or name.suffix.lower() not in SUFFIXES:
                    continue
                if member.size > _MAX_BYTES:
                    raise UserError(
                        f"{path}: {name} has {member.size:,} bytes, far more than a "
                        f"{SIDE}x{SIDE} image. Check the archive."
                    )
                yield name.parent.name, name.name, archive.extractfile(member).read()
    except READ_ERRORS as error:
        raise UserError(
            f"{path} can't be read to its end ({type(error).__name__}: {error}): it is cut off, "
            "damaged or no archive. Get it again."
        ) from error


def _decode(data: bytes, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (SIDE, SIDE):
                raise UserError(
                    f"{where} has {image.size[0]}x{image.size[1]} pixels, expected {SIDE}x{SIDE}. "
                    "Resize the images first; larger ones are for tools/train_net.py's own "
                    "folders and shards."
                )
            return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    # Pillow raises many kinds, SyntaxError among them.
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where} can't be decoded ({type(error).__name__}: {error}). Remove or replace it."
        ) from error
