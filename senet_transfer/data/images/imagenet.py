"""The official ImageNet (ILSVRC 2012) distribution: archives and unpacked folders.

Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge". The classes are
WordNet ids such as `n01440764`, sorted by name. This is the label order of torchvision's ImageNet
class and of most published weights. The development kit numbers the classes differently, and uses
these numbers as labels of the validation images. The kit is read with torchvision.
"""

import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from torchvision.datasets.imagenet import (
    ARCHIVE_META,
    META_FILE,
    load_meta_file,
    parse_devkit_archive,
)

from senet_transfer.data.images.file_types import is_image_name
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.images.listing import Images, archive_members, find_listed_images
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

SPLITS = ("val", "train")
ARCHIVES = {split: ARCHIVE_META[split][0] for split in SPLITS}
DEVKIT = ARCHIVE_META["devkit"][0]

_VAL_NAME = "ILSVRC2012_val_{:08d}.JPEG"


def open_imagenet(
    source: str | Path,
    split: str,
    *,
    exclude: str | Path | None = None,
    skip_missing: int = 0,
) -> Images:
    """Find the images and labels of an ImageNet split.

    Args:
        source: Folder with the archives or the folders `train` and `val`. It must also contain the
            development kit if the validation images are not in class folders.
        split: One of `SPLITS`.
        exclude: File that lists the images to leave out, one per line: file names, or indices of
            validation images (from 1) as in `ILSVRC2014_clsloc_validation_blacklist.txt`.
        skip_missing: Maximum number of empty files to skip. If there are more, an error is raised.

    Raises:
        UserError: If a file is missing or damaged, or the labels do not match the images.
    """
    source = Path(source)
    if split not in SPLITS or not source.is_dir():
        raise UserError(
            f"Cannot open the split {split!r} in {source}; expected one of the splits "
            f"{', '.join(SPLITS)} in a folder with the ImageNet archives. Check the path."
        )
    place = _images_of(source, split)
    if place is None:
        raise UserError(
            f"No {split} images found in {source}; expected the folder {split} or the archive "
            f"{ARCHIVES[split]}. Download the archive from image-net.org, or pass the folder that "
            "contains it."
        )
    images = open_imagenet_images(place, split, skip_missing=skip_missing)
    return images if exclude is None else _without(images, Path(exclude))


def find_imagenet(path: Path, split: str) -> tuple[Path, str] | None:
    """Find the ImageNet archive or image folder at a path.

    Args:
        path: ImageNet archive, folder that contains an archive or the development kit, or folder of
            validation images that are not in class folders.
        split: Split to select in a folder that contains both. Names that begin with "train" select
            the training images, other names the validation images.

    Returns:
        The path of the archive or folder, and the split, "train" or "val". None if the path
        contains other data.
    """
    for name, archive in ARCHIVES.items():
        if path.name == archive:
            return path, name
    split = "train" if split.startswith("train") else "val"
    place = _images_of(path, split)
    if place and any((path / name).is_file() for name in (*ARCHIVES.values(), DEVKIT)):
        return place, split
    return (path, "val") if _is_flat(path) else None


def _images_of(folder: Path, split: str) -> Path | None:
    """Return a split's archive or folder, or None if neither exists."""
    # The archive has priority, because the folder may contain shards converted from the archive.
    places = folder / ARCHIVES[split], folder / split
    return next((place for place in places if place.exists()), None)


def open_imagenet_images(path: Path, split: str, *, skip_missing: int = 0) -> Images:
    """Find ImageNet images and their labels in an archive, class folders or a validation folder.

    The parent folder of `path` is searched for the development kit, or for the `meta.bin` that
    torchvision creates from the kit. One of them is required for validation images that are not in
    class folders.

    Raises:
        UserError: If a file is missing or damaged, or the labels do not match the images.
    """
    devkit = _read_devkit(path.parent)
    if path.is_dir() and not _is_flat(path):
        return open_folder(path, devkit and devkit[0], skip_empty=skip_missing)
    members = None if path.is_dir() else archive_members(path)
    names = sorted(filter(is_image_name, os.listdir(path)) if members is None else members)
    if split == "train":
        ids = [name.rpartition("/")[0] for name in names]
        classes = devkit[0] if devkit else sorted(set(ids))
    elif devkit:
        classes, ids = devkit
    else:
        raise UserError(
            f"{path} contains no labels; expected {DEVKIT} in the same folder. Download the "
            "development kit (tasks 1 and 2) from image-net.org."
        )
    if len(ids) != len(names):
        raise UserError(
            f"{path} contains {len(names)} images; expected {len(ids)}, the number of labels in "
            "the development kit, because labels are assigned in the order of the image names. "
            "Unpack or download the archive again. To leave out images, use --exclude."
        )
    if unknown := sorted(set(ids).difference(classes)):
        raise UserError(
            f"{path} contains the classes {first_of(unknown)}, which are not among the "
            f"{len(classes)} classes of the development kit. Use the ILSVRC 2012 files."
        )
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[name] for name in ids], np.int32)
    return find_listed_images(
        path, names, labels, classes, complete=False, skip_missing=skip_missing, members=members
    )


def _is_flat(path: Path) -> bool:
    """Return True if a folder contains validation images that are not in class folders."""
    return path.is_dir() and any(path.glob("ILSVRC2012_val_*"))


def _read_devkit(folder: Path) -> tuple[list[str], list[str]] | None:
    """Read the development kit in a folder.

    Returns:
        The classes in label order, and the class of each validation image in order of the file
        names. None if the folder contains no development kit.
    """
    try:
        if (folder / META_FILE).is_file():
            names, labels = load_meta_file(folder)
        elif (folder / DEVKIT).is_file():
            # torchvision writes to the archive's folder, which may be read-only.
            with tempfile.TemporaryDirectory() as temporary:
                Path(temporary, DEVKIT).symlink_to((folder / DEVKIT).absolute())
                parse_devkit_archive(temporary)
                names, labels = load_meta_file(temporary)
        else:
            return None
    except ImportError as error:
        raise UserError(
            f"Reading {folder / DEVKIT} requires SciPy: {error}. Install it: pip install scipy"
        ) from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"Cannot read the development kit in {folder}: {error}. Expected {DEVKIT} with the MD5 "
            f"checksum {ARCHIVE_META['devkit'][1]}, or the {META_FILE} that torchvision creates "
            "from this archive. Download the kit again."
        ) from error
    return sorted(names), list(labels)


def _without(images: Images, path: Path) -> Images:
    """Return a copy of the image list without the images listed in a file."""
    try:
        lines = path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {path}: {error}. Expected a text file with one image per line."
        ) from error
    listed = {
        _VAL_NAME.format(int(line)) if line.isdecimal() else os.path.basename(line)
        for line in lines
    }
    base = [os.path.basename(name) for name in images.names]
    if unknown := sorted(listed.difference(base)):
        raise UserError(
            f"{path} lists {len(unknown)} images that are not in {images.root}: "
            f"{first_of(unknown)}. Expected an image name, or the index of a validation image, "
            "per line. Use the list that belongs to this split."
        )
    keep = np.array([index for index, name in enumerate(base) if name not in listed], int)
    return replace(
        images,
        names=[images.names[index] for index in keep],
        labels=images.labels[keep],
        sizes=images.sizes[keep],
        offsets=None if images.offsets is None else images.offsets[keep],
    )
