"""Places365 as its site serves it: lists, archives and unpacked folders.

Zhou et al. 2018, "Places: A 10 million image database for scene recognition". Labels come from the
lists only: classes nest (`/s/swimming_pool/indoor`), so folder names do not tell them. The train
archives of Standard and Challenge unpack to folders of the same name; torchvision's way around,
appending the variant, is understood too.
"""

import re
import tarfile
from pathlib import Path

import numpy as np

from senet_transfer.data.images.listing import Images, find_listed_images
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

SPLITS = ("val", "train_standard", "train_challenge")
SIZES = ("256", "large")
CATEGORIES = "categories_places365.txt"

# The lists' own archives.
_LIST_ARCHIVES = ("filelist_places365-standard.tar", "filelist_places365-challenge.tar")


def list_name(split: str) -> str:
    """The name of a split's list."""
    return f"places365_{split}.txt"


def image_places(split: str, size: str) -> list[str]:
    """The folders and archives that can hold a split's images, the surest first."""
    if split == "val":
        return [f"val_{size}", f"val_{size}.tar"]
    variant = split.removeprefix("train_")
    return [f"data_{size}_{variant}", f"train_{size}_places365{variant}.tar", f"data_{size}"]


def open_places365(
    source: str | Path, split: str, size: str = "256", *, skip_missing: int = 0
) -> Images:
    """Finds a split's images and labels.

    Args:
        source: the folder with the lists, and the images' folders or archives.
        split: one of `SPLITS`.
        size: "256" or "large".
        skip_missing: this many listed images that are not there are left out.

    Raises:
        UserError: a list is missing or damaged, or images and list do not match.
    """
    source = Path(source)
    if split not in SPLITS or size not in SIZES:
        raise UserError(
            f"there is no split {split!r} of size {size!r}: expected one of {', '.join(SPLITS)} "
            f"and one of {', '.join(SIZES)}."
        )
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; expected one with Places365's lists in it.")
    places = image_places(split, size)
    found = [source / place for place in places if (source / place).exists()]
    if not found:
        raise UserError(
            f"found no images of {split} in {source}: expected one of {', '.join(places)}. "
            "Download the archive from the data set's site, or give the folder that holds it."
        )
    return open_places365_images(found[0], source, split, skip_missing=skip_missing)


def open_places365_images(
    images: Path, lists: Path, split: str, *, skip_missing: int = 0
) -> Images:
    """As `open_places365`, of a known folder or archive with the lists in another folder."""
    classes = read_categories(_read_list(lists, CATEGORIES), str(lists / CATEGORIES))
    where = lists / list_name(split)
    names, labels = read_list(_read_list(lists, list_name(split)), str(where), len(classes))
    # A folder of train images can hold both variants; one of val holds val.
    complete = split == "val"
    return find_listed_images(
        images, names, labels, classes, complete=complete, skip_missing=skip_missing
    )


def has_lists(folder: Path, split: str) -> bool:
    """Says whether a folder holds a split's list, by itself or in the lists' archive."""
    return any((folder / name).is_file() for name in (list_name(split), *_LIST_ARCHIVES))


def read_categories(text: str, where: str) -> list[str]:
    """Parses the list of classes, lines of name and label.

    Raises:
        UserError: a line is not that, or the labels are not 0 to N-1.
    """
    names, labels = read_list(text, where, None)
    if sorted(labels) != list(range(len(names))):
        raise UserError(
            f"{where} has {len(names)} classes, expected their labels to be 0 to {len(names) - 1}, "
            "each once. Download the lists again."
        )
    order = np.argsort(labels)
    return [names[index] for index in order]


def read_list(text: str, where: str, num_classes: int | None) -> tuple[list[str], np.ndarray]:
    """Parses a list of images, lines of path and label.

    Returns:
        The paths without a leading slash, and the labels as `(N,)` int32.

    Raises:
        UserError: naming every line, up to a limit, that is not that, has a label out of range, a
            path that leads elsewhere, or a name listed before.
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
            bad.append(f"line {number}: label {label} of {name} is not below {num_classes}")
        elif ".." in name.split("/"):
            bad.append(f"line {number}: {name} leads out of the folder")
        elif name in seen:
            bad.append(f"line {number}: {name} is listed twice")
        seen.add(name)
        names.append(name)
        labels.append(label)
    if bad:
        raise UserError(
            f"{where} has {len(bad)} bad lines: {first_of(bad)}. Expected one path and one label "
            "per line, each path once. Download the lists again."
        )
    if not names:
        raise UserError(f"{where} is empty. Download the lists again.")
    return names, np.array(labels, np.int32)


def _read_list(folder: Path, name: str) -> str:
    """A list's text, from the folder or from one of the lists' archives in it."""
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
        raise UserError(f"cannot read {name} in {folder}: {error}.") from error
    raise UserError(
        f"the list {name} is not in {folder}. Expected it there, or in one of "
        f"{', '.join(_LIST_ARCHIVES)}, from the data set's site."
    )
