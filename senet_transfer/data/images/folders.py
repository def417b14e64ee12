"""A plain tree of images with one folder a class."""

import logging
import os
from pathlib import Path

import numpy as np

from senet_transfer.data.images.listing import Images, find_listed_images, is_image_name
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

logger = logging.getLogger(__name__)


def open_folder(
    root: str | Path, classes: list[str] | None = None, *, skip_empty: int = 0
) -> Images:
    """Lists a tree of images; a class is the path, below the root, of a folder that holds some.

    For folders right under the root that is torchvision's ImageFolder: classes sorted by name.
    Deeper folders are classes of their own, `dogs/husky`, so that two of the same last name are
    told apart.

    Args:
        root: of the tree.
        classes: names in the order of their labels, for a tree that lacks some classes or has to
            agree with another one; None to take the folders', sorted.
        skip_empty: this many empty files are left out.

    Raises:
        UserError: there are no images, images outside of all classes, or folders that are none of
            `classes`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected one with a folder a class in it.")
    by_class = _images_by_folder(root)
    if "" in by_class:
        raise UserError(
            f"{root} holds images outside of all class folders: {first_of(by_class[''])}. Expected "
            "a folder a class; move them into one, or give the folder that holds the classes."
        )
    if not any(by_class.values()):
        raise UserError(f"found no images in {root}: expected .jpg or .png in a folder a class.")
    found = sorted(folder for folder, images in by_class.items() if images)
    empty = sorted(set(by_class).difference(found))
    if empty and classes is None:
        raise UserError(
            f"{len(empty)} folders in {root} hold no images: {first_of(empty)}. Whether they are "
            "classes decides the labels: remove them, or fill them."
        )
    classes = found if classes is None else list(classes)
    unknown = sorted(set(found).difference(classes))
    if unknown:
        raise UserError(
            f"{len(unknown)} folders in {root} are none of the {len(classes)} classes expected: "
            f"{first_of(unknown)}. Use a tree with the folders of the one that was trained on."
        )
    label_of = {name: label for label, name in enumerate(classes)}
    names = [name for folder in found for name in by_class[folder]]
    labels = np.array([label_of[folder] for folder in found for _ in by_class[folder]], np.int32)
    return find_listed_images(root, names, labels, classes, complete=False, skip_missing=skip_empty)


def _images_by_folder(root: Path) -> dict[str, list[str]]:
    """Sorted paths of images by the folder they are in; leaves without images have none."""
    by_folder: dict[str, list[str]] = {}
    for path, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(path).relative_to(root).as_posix()
        folder = "" if folder == "." else folder
        images = sorted(f"{folder}/{name}".lstrip("/") for name in files if is_image_name(name))
        if images or (folder and not folders):
            by_folder[folder] = images
        others = [name for name in files if not is_image_name(name) and not name.startswith(".")]
        if others:
            logger.warning("ignoring %d files in %s: %s", len(others), path, first_of(others))
    return by_folder
