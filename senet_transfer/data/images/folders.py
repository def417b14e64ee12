"""Image datasets with one folder per class, and the order of their classes."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from senet_transfer.data.images.class_names import (
    NUMERIC,
    check_encoding,
    match_names,
    read_class_list,
    sort_by_name,
    sort_by_number,
)
from senet_transfer.data.images.label_csv import is_label_csv, open_label_csv, read_label_csv
from senet_transfer.data.images.listing import Images, find_images, find_listed_images
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

# Names of folders that contain a split's class folders.
_SPLITS = {"test", "testing", "train", "training", "val", "valid", "validation"}

# Names of folders with training images, such as `train2017` or `images_train`, in lower case.
_TRAIN = re.compile(r"(?<![a-z])(train|training|trainval)(?![a-z])")


def open_images(
    source: str | Path, classes: list[str] | None = None, *, skip_empty: int = 0
) -> Images:
    """List the images in a folder with one folder per class, or in a CSV file.

    See :func:`open_folder` and :func:`~senet_transfer.data.images.label_csv.open_label_csv`.
    """
    if is_label_csv(source):
        return open_label_csv(source, classes, skip_missing=skip_empty)
    return open_folder(source, classes, skip_empty=skip_empty)


def open_folder(
    root: str | Path, classes: list[str] | None = None, *, skip_empty: int = 0
) -> Images:
    """List the images in a folder with one folder per class.

    Class names are folder paths relative to the root. If all class folders are directly below the
    root, the layout and the class order are those of torchvision's ImageFolder. A nested folder
    such as `dogs/husky` is a separate class.

    Args:
        root: Folder that contains the class folders.
        classes: Class names in label order. Required if some classes have no images, or if the
            labels must match those of a different folder. None to use the sorted paths of the class
            folders.
        skip_empty: Maximum number of empty files to leave out. If there are more, an error is
            raised.

    Raises:
        UserError: If the folder contains no images, images outside of class folders, or class
            folders that are not in `classes`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder; expected a folder with one folder per class. Check the path."
        )
    names, labels, classes = label_images(find_images(root), root, classes)
    return find_listed_images(root, names, labels, classes, complete=False, skip_missing=skip_empty)


def label_images(
    by_class: Mapping[str, list[str]], root: Path, classes: list[str] | None = None
) -> tuple[list[str], np.ndarray, list[str]]:
    """Assign labels to the images in class folders.

    Args:
        by_class: Dictionary from class folder to image paths. Images that are directly in `root`
            are listed under the key "".
        root: Folder or archive that contains the class folders.
        classes: Class names in label order; see :func:`open_folder`.

    Returns:
        The image paths, sorted by folder, their labels, int32 `(N,)`, and the class names.

    Raises:
        UserError: See :func:`open_folder`.
    """
    _check_class_folders(by_class, root, allow_empty=classes is not None)
    found = sorted(folder for folder, images in by_class.items() if images)
    check_encoding(found, root)
    _check_splits(found, root, classes)
    classes = sort_by_name(found, root) if classes is None else list(classes)
    matches = match_names(found, classes)
    unknown = sorted(set(found).difference(matches))
    if unknown:
        raise UserError(
            f"{len(unknown)} folders in {root} are not among the {len(classes)} expected classes: "
            f"{first_of(unknown)}. Use the same class folders as in the training data."
        )
    label_of = {name: label for label, name in enumerate(classes)}
    names = [name for folder in found for name in by_class[folder]]
    labels = np.array(
        [label_of[matches[folder]] for folder in found for _ in by_class[folder]], np.int32
    )
    return names, labels, classes


def _check_class_folders(
    by_class: Mapping[str, list[str]], root: Path, *, allow_empty: bool
) -> None:
    """Raise a UserError if images are outside of class folders, or a class folder is empty.

    If ``allow_empty`` is True, a single class folder with images is sufficient.
    """
    if "" in by_class:
        raise UserError(
            f"{root} contains images outside of class folders: {first_of(by_class[''])}. Expected "
            "one folder per class. Move the images into class folders, or pass the parent of the "
            "class folders."
        )
    if not any(by_class.values()):
        raise UserError(
            f"No images found in {root}; expected image files, such as .jpg or .png, in one "
            "folder per class."
        )
    empty = sorted(folder for folder, images in by_class.items() if not images)
    if empty and not allow_empty:
        raise UserError(
            f"{len(empty)} folders in {root} contain no images: {first_of(empty)}. Labels depend "
            "on whether these folders count as classes. Remove the folders or add images."
        )


def _check_splits(found: list[str], root: Path, classes: list[str] | None) -> None:
    """Raise a UserError if the class folders are actually splits, such as `train` and `val`."""
    splits = _splits(found)
    if splits and (classes is None or not set(found).issubset(classes)):
        raise UserError(
            f"{root} contains the folders {first_of(splits)}, which are splits, not classes. "
            f"Pass one of these folders, such as {root / min(splits, key=len)}. If the folders are "
            "classes, list them in a file for --classes, or in DATASETS.CLASSES."
        )


def _splits(found: list[str]) -> list[str]:
    """Return the top-level folders that are splits, or an empty list if they are classes.

    The folders are splits if all of them are named like splits, or if one is named like a training
    split and another contains mostly the same class folders.
    """
    inner: dict[str, set[str]] = {}
    for folder in found:
        top, _, name = folder.partition("/")
        inner.setdefault(top, set()).add(name)
    # A single folder without class folders is itself a class.
    if {top.lower() for top in inner} <= _SPLITS and (len(inner) > 1 or inner != {top: {""}}):
        return sorted(inner)
    classes_of = {top: names - {""} for top, names in inner.items()}
    for train in (top for top in inner if _TRAIN.search(top.lower())):
        similar = [
            top
            for top, names in classes_of.items()
            if 2 * len(names & classes_of[train]) > min(len(names), len(classes_of[train]))
        ]
        if len(similar) > 1:
            return sorted(similar)
    return []


def choose_classes(choice: str, root: str | Path) -> list[str]:
    """Return the class names in the order selected with ``--classes``.

    Args:
        choice: "numeric", or the path of a file with one class name per line.
        root: Folder with one folder per class, or CSV file.

    Raises:
        UserError: If the file is invalid, or if `choice` is "numeric" and a class name is not a
            whole number.
    """
    return numeric_classes(root) if choice == NUMERIC else read_class_list(choice)


def numeric_classes(root: str | Path) -> list[str]:
    """Return the classes in a folder or CSV file in numeric order.

    Raises:
        UserError: If the path is neither a folder nor a CSV file, or a class name is not a whole
            number.
    """
    if is_label_csv(root):
        return sort_by_number({label for label, _ in read_label_csv(root).values()}, root)
    if not Path(root).is_dir():
        raise UserError(
            f"--classes {NUMERIC} requires a CSV file or a folder with one folder per class, but "
            f"{root} is neither. Shards and archives have fixed labels. Remove --classes."
        )
    by_class = find_images(root)
    _check_class_folders(by_class, Path(root), allow_empty=False)
    return sort_by_number(by_class, root)
