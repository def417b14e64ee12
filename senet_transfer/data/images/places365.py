"""The official Places365 distribution: lists, archives and unpacked folders.

Zhou et al. 2018, "Places: A 10 million image database for scene recognition". Labels are read only
from the lists, because classes are nested (`/s/swimming_pool/indoor`) and folder names are
ambiguous. The training archives of the Standard and Challenge variants unpack to folders with the
same name. Folders renamed by torchvision, with the variant appended to the name, are also
supported.
"""

import functools
import re
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np

from senet_transfer.data.images.listing import Images, find_listed_images
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

SPLITS = ("val", "train_standard", "train_challenge")
SIZES = ("256", "large")
CATEGORIES = "categories_places365.txt"

# Archives that contain the lists.
_LIST_ARCHIVES = ("filelist_places365-standard.tar", "filelist_places365-challenge.tar")


@functools.cache
def places365_classes() -> dict[str, bool]:
    """Return a dict, in label order, from each class name to True if the scene is outdoors."""
    text = files(__package__).joinpath("places365_classes.txt").read_text("utf-8")
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {name: kind == "2" for name, kind in rows}


def list_name(split: str) -> str:
    """Return the file name of a split's image list."""
    return f"places365_{split}.txt"


def image_places(split: str, size: str) -> list[str]:
    """Return the possible names of a split's image folder or archive, in order of preference."""
    if split == "val":
        return [f"val_{size}", f"val_{size}.tar"]
    variant = split.removeprefix("train_")
    return [f"data_{size}_{variant}", f"train_{size}_places365{variant}.tar", f"data_{size}"]


def open_places365(
    source: str | Path, split: str, size: str = "256", *, skip_missing: int = 0
) -> Images:
    """Find the images and labels of a Places365 split.

    Args:
        source: Folder with the lists and the image folders or archives.
        split: One of `SPLITS`.
        size: Image size, "256" or "large".
        skip_missing: Maximum number of missing images to skip. If there are more, an error is
            raised.

    Raises:
        UserError: If a list is missing or damaged, or the images do not match the list.
    """
    source = Path(source)
    if split not in SPLITS or size not in SIZES:
        raise UserError(
            f"Unknown split {split!r} or size {size!r}; expected one of the splits "
            f"{', '.join(SPLITS)} and one of the sizes {', '.join(SIZES)}."
        )
    if not source.is_dir():
        raise UserError(
            f"{source} is not a folder; expected a folder with the Places365 lists. Check the path."
        )
    places = image_places(split, size)
    found = [source / place for place in places if (source / place).exists()]
    if not found:
        raise UserError(
            f"No {split} images found in {source}; expected one of {', '.join(places)}. Download "
            "the archive from the dataset's website, or pass the folder that contains it."
        )
    return open_places365_images(found[0], source, split, skip_missing=skip_missing)


def open_places365_images(
    images: Path, lists: Path, split: str, *, skip_missing: int = 0
) -> Images:
    """Find the images and labels of a Places365 split, given separate paths for images and lists.

    Args:
        images: Folder or archive with the images.
        lists: Folder with the lists.
        split: One of `SPLITS`.
        skip_missing: Maximum number of missing images to skip. If there are more, an error is
            raised.

    Raises:
        UserError: If a list is missing or damaged, or the images do not match the list.
    """
    classes = read_categories(_read_list(lists, CATEGORIES), str(lists / CATEGORIES))
    where = lists / list_name(split)
    names, labels = read_list(_read_list(lists, list_name(split)), str(where), len(classes))
    # A folder of training images may contain both variants, including images that are not listed.
    complete = split == "val"
    return find_listed_images(
        images, names, labels, classes, complete=complete, skip_missing=skip_missing
    )


def has_lists(folder: Path, split: str) -> bool:
    """Return True if a folder contains a split's image list or an archive of lists."""
    return any((folder / name).is_file() for name in (list_name(split), *_LIST_ARCHIVES))


def read_categories(text: str, where: str) -> list[str]:
    """Parse a class list with one name and label per line.

    Raises:
        UserError: If a line is malformed, or the labels are not 0 to N-1.
    """
    names, labels = read_list(text, where, None)
    if sorted(labels) != list(range(len(names))):
        raise UserError(
            f"{where} lists {len(names)} classes; expected each label from 0 to {len(names) - 1} "
            "exactly once. Download the lists again."
        )
    order = np.argsort(labels)
    return [names[index] for index in order]


def read_list(text: str, where: str, num_classes: int | None) -> tuple[list[str], np.ndarray]:
    """Parse an image list with one path and label per line.

    Returns:
        The paths without a leading slash, and the labels, int32 `(N,)`.

    Raises:
        UserError: If a line is malformed, a label is out of range, or a path is outside of the
            image folder or listed twice. The message contains the first such lines.
    """
    names, labels, bad, seen = [], [], [], set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*/?(\S.*?)\s+(\d{1,9})\s*", line)
        if match is None:
            bad.append(f"line {number}: {line[:80]!r} is not a path and a label")
            continue
        name, label = match[1].lstrip("/"), int(match[2])
        if num_classes is not None and label >= num_classes:
            bad.append(f"line {number}: label {label} of {name} is not less than {num_classes}")
        elif ".." in name.split("/"):
            bad.append(f"line {number}: {name} is outside of the image folder")
        elif name in seen:
            bad.append(f"line {number}: {name} is listed twice")
        seen.add(name)
        names.append(name)
        labels.append(label)
    if bad:
        raise UserError(
            f"{where} contains {len(bad)} invalid lines: {first_of(bad)}. Expected one path and "
            "one label per line, and each path only once. Download the lists again."
        )
    if not names:
        raise UserError(f"{where} is empty. Download the lists again.")
    return names, np.array(labels, np.int32)


def _read_list(folder: Path, name: str) -> str:
    """Read a Places365 list from a folder, or from an archive of lists in the folder."""
    try:
        if (folder / name).is_file():
            return (folder / name).read_text("utf-8")
        for archive in _LIST_ARCHIVES:
            if (folder / archive).is_file():
                with tarfile.open(folder / archive) as tar:
                    for member in tar:
                        found = member.isreg() and member.name.rpartition("/")[2] == name
                        if found and (file := tar.extractfile(member)):
                            return file.read().decode("utf-8")
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {name} in {folder}: {error}. Download the lists again."
        ) from error
    raise UserError(
        f"The list {name} was not found in {folder}; expected it in this folder, or in one of the "
        f"archives {', '.join(_LIST_ARCHIVES)}. Download it from the dataset's website."
    )
