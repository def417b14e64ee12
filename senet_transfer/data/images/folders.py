"""Image data sets with one folder per class, and the order of their classes."""

import logging
import os
from collections.abc import Iterator
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
from senet_transfer.data.images.file_types import is_array_name, is_hidden, is_image_name
from senet_transfer.data.images.label_csv import is_label_csv, open_label_csv, read_label_csv
from senet_transfer.data.images.listing import Images, find_listed_images
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

# Names of folders that contain a split's class folders.
_SPLITS = {"test", "testing", "train", "training", "val", "valid", "validation"}

logger = logging.getLogger(__name__)


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
    by_class = _images_by_folder(root)
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
    found = sorted(folder for folder, images in by_class.items() if images)
    empty = sorted(set(by_class).difference(found))
    if empty and classes is None:
        raise UserError(
            f"{len(empty)} folders in {root} contain no images: {first_of(empty)}. Labels depend "
            "on whether these folders count as classes. Remove the folders or add images."
        )
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
    return find_listed_images(root, names, labels, classes, complete=False, skip_missing=skip_empty)


def _check_splits(found: list[str], root: Path, classes: list[str] | None) -> None:
    """Raise a UserError if the folders are splits instead of classes."""
    tops = {folder.partition("/")[0] for folder in found}
    if len(tops) < 2 or not {top.lower() for top in tops} <= _SPLITS:
        return
    if classes is None or not set(found).issubset(classes):
        raise UserError(
            f"{root} contains the folders {first_of(sorted(tops))}, which are splits, not classes. "
            f"Pass one of these folders, such as {root / min(tops, key=len)}. If the folders are "
            "classes, list them in a file for --classes, or in DATASETS.CLASSES."
        )


def choose_classes(choice: str, root: str | Path) -> list[str]:
    """Return the class names in the order selected with ``--classes``.

    Args:
        choice: "numeric", or the path of a file with one class name per line.
        root: Folder with one folder per class, or CSV file.

    Raises:
        UserError: If the file is invalid, or the class names are not numbers.
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
            f"--classes is numeric, but {root} is neither a folder with one folder per class "
            "nor a CSV file. Shards and archives have fixed labels. Remove --classes."
        )
    found = [folder for folder, images in _images_by_folder(Path(root)).items() if images]
    return sort_by_number(found, root)


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the results of `os.walk` in sorted order, without hidden folders."""
    for path, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield path, folders, files


def _images_by_folder(root: Path) -> dict[str, list[str]]:
    """Return the sorted image paths in each folder, including empty folders without subfolders.

    NumPy arrays are only treated as images if there are no other images.
    """
    photos = any(is_image_name(name) for _, _, files in _walk(root) for name in files)
    is_image = is_image_name if photos else is_array_name
    by_folder: dict[str, list[str]] = {}
    for path, folders, files in _walk(root):
        folder = Path(path).relative_to(root).as_posix()
        folder = "" if folder == "." else folder
        images = sorted(f"{folder}/{name}".lstrip("/") for name in files if is_image(name))
        if images or (folder and not folders):
            by_folder[folder] = images
        others = [name for name in files if not is_image(name) and not is_hidden(name)]
        if others:
            logger.warning(
                "Ignoring %d files in %s that are not images: %s",
                len(others),
                path,
                first_of(others),
            )
    return by_folder
