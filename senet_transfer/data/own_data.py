"""Search for training and validation data at a path specified by the user."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from senet_transfer.data.build import find_dataset
from senet_transfer.data.detection.formats.prepare import write_dataset
from senet_transfer.data.detection.formats.records import NOTES
from senet_transfer.data.detection.formats.source import (
    annotations_exist,
    find_source,
    read_annotations,
    split_path,
)
from senet_transfer.data.detection.json_file import read_json_object
from senet_transfer.data.images import places365
from senet_transfer.data.shards.manifest import MANIFEST
from senet_transfer.data.shards.storage import is_remote
from senet_transfer.data.split_files import split_coco, split_data
from senet_transfer.data.splits import TRAIN, VAL, Split
from senet_transfer.errors import UserError

# Names of the folders and files for each split, in lower case.
_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation")

# Required entries of a JSON file in COCO format.
_COCO_KEYS = ("images", "annotations", "categories")

_COCO_NAMES = "_annotations.coco.json", "annotations.json"

logger = logging.getLogger(__name__)


class DataPart(NamedTuple):
    """Training or validation data.

    Attributes:
        path: For detection, the path of the annotations, as in `DATASETS.REGISTER`. For
            classification, the path or URL of the labelled images, as in `DATASETS.TRAIN`.
        image_dir: Folder with the images for detection annotations; empty for classification.
    """

    path: str
    image_dir: str = ""


def find_parts(path: str, val: str = "", image_dir: str = "") -> tuple[DataPart, DataPart | None]:
    """Find training and validation data for detection or classification.

    Args:
        path: One of the following: a JSON file in COCO format; a folder with one such file per
            split, such as `train.json`, `train/_annotations.coco.json` or
            `annotations/instances_train*.json`; annotations in another supported format; labelled
            images as in `DATASETS.TRAIN` for a classifier; a folder with labelled images in its
            subfolders `train` and `val`.
        val: Path of the validation data, in the same form as `path`; empty to search in `path`.
        image_dir: Image folder for detection annotations; empty to search for this folder.

    Returns:
        The training data, and the validation data or None if there is none.

    Raises:
        UserError: If no data is found, or if one split is for detection and the other for
            classification.
    """
    train, found = _parts(path, image_dir)
    if val:
        whole, inner = _parts(val, image_dir)
        found = inner or whole
    if found and bool(found.image_dir) != bool(train.image_dir):
        kinds = ["detection" if part.image_dir else "classification" for part in (train, found)]
        raise UserError(
            f"{train.path} is {kinds[0]} data, but {found.path} is {kinds[1]} data; expected the "
            "same kind of data for training and validation. Correct --data or --val."
        )
    return train, found


def divide(data: DataPart, folder: Path, *, upright: bool = True) -> tuple[DataPart, DataPart, str]:
    """Split data into training and validation data, and write the files of both splits.

    Args:
        data: The data to split.
        folder: Folder for the files. Files from an earlier split are replaced.
        upright: Whether annotations refer to the images with EXIF orientation applied.

    Returns:
        The training data, the validation data, and a table with the number of objects or images per
        class and split.

    Raises:
        UserError: If the data can't be split.
    """
    if data.image_dir:
        content = read_annotations(*data, upright=upright)
        for note in content.get(NOTES, ()):  # the new files don't contain them
            logger.warning("%s: %s.", data.path, note)
        # Optional entries such as `info`, which describes the original file, are omitted.
        needed = {key: content[key] for key in _COCO_KEYS if key in content}
        contents, table = split_coco(needed, data.path, Split())
        write_dataset(contents, folder, data.image_dir, source=data.path, replace=True)
        names = [f"{name}.json" for name in (TRAIN, VAL)]
    else:
        names = [f"{name}.csv" for name in (TRAIN, VAL)]
        for name in names:
            (folder / name).unlink(missing_ok=True)
        table = split_data(data.path, folder, Split())
    train, val = (DataPart(str(folder.absolute() / name), data.image_dir) for name in names)
    return train, val, table


def _parts(path: str, image_dir: str) -> tuple[DataPart, DataPart | None]:
    """Return the training and validation data at a path.

    The validation data is None if the path contains no separate validation split.
    """
    if is_remote(path):
        return DataPart(path), None
    path = os.path.expanduser(path)
    if not annotations_exist(path):
        path = find_dataset(path)  # relative to $DETECTRON2_DATASETS
    if Path(path, MANIFEST).is_file():
        return DataPart(find_dataset(path)), None
    return _coco_parts(Path(path), image_dir) or _annotated(path, image_dir) or _image_parts(path)


def _coco_parts(path: Path, image_dir: str) -> tuple[DataPart, DataPart | None] | None:
    """Return the training and validation data, or None if no COCO annotations are found."""
    if path.is_dir():
        train, val = (_coco_file(path, names) for names in (_TRAIN_NAMES, _VAL_NAMES))
        if train:
            return _coco_part(train, image_dir), _coco_part(val, image_dir) if val else None
    for file in (path, *(path / name for name in _COCO_NAMES)):
        if file.suffix.lower() == ".json" and file.is_file() and find_source(file) is None:
            return _coco_part(file, image_dir), None
    return None


def _image_parts(path: str) -> tuple[DataPart, DataPart | None]:
    """Return the training and validation data of a classification dataset."""
    folder = Path(path)
    if folder.is_dir():
        train, val = (_subfolder(folder, names) for names in (_TRAIN_NAMES, _VAL_NAMES))
        if train:
            return DataPart(str(train)), DataPart(str(val)) if val else None
        if places365.has_lists(folder, "train_standard"):
            part = DataPart(find_dataset(path))
            return part, part if places365.has_lists(folder, "val") else None
    return DataPart(find_dataset(path)), None


def _annotated(path: str, image_dir: str) -> tuple[DataPart, DataPart | None] | None:
    """Return the training and validation data, or None if no annotations are found.

    This function supports detection annotations in formats other than COCO.
    """
    place, split = split_path(path)
    source = find_source(place)
    if source is None:
        return None
    folder = os.path.abspath(os.path.expanduser(image_dir) or source.image_folder())
    whole = DataPart(os.path.abspath(path), folder)
    splits = source.read(folder).splits
    if split or len(splits) == 1:
        return whole, None
    train = next((name for name in (TRAIN, "trainval") if name in splits), None)
    if train is None:
        raise UserError(
            f"{place} contains the splits {', '.join(splits)}; expected a split named {TRAIN}. "
            f"Specify the split to train on: --data {place}:{next(iter(splits))}."
        )
    found = [DataPart(f"{whole.path}:{name}", folder) for name in (train, VAL)]
    return found[0], found[1] if VAL in splits and train == TRAIN else None


def _coco_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the COCO annotation file of a split, or None if none exists.

    ``names`` are alternative names of the split, such as "val" and "valid". The first name with an
    existing file is used.
    """
    for name in names:
        annotations = folder / "annotations"
        listed = sorted(annotations.iterdir()) if annotations.is_dir() else []
        pattern = re.compile(rf"(instances_)?{name}\d*\.json")
        files = [folder / f"{name}.json", *(folder / name / coco for coco in _COCO_NAMES)]
        files += [file for file in listed if pattern.fullmatch(file.name)]
        if found := next((file for file in files if file.is_file()), None):
            return found
    return None


def _subfolder(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the subfolder with one of the given names, ignoring case, or None if none exists."""
    entries = {entry.name.lower(): entry.absolute() for entry in folder.iterdir() if entry.is_dir()}
    return next((entries[name] for name in names if name in entries), None)


def _coco_part(file: Path, image_dir: str) -> DataPart:
    """Return the paths of a JSON annotation file and of the folder that contains its images.

    Raises:
        UserError: If ``image_dir`` is empty and the first image is not in any of the usual folders.
    """
    path = str(file.absolute())
    if image_dir:
        return DataPart(path, os.path.abspath(os.path.expanduser(image_dir)))
    if source := find_source(file):  # such as Label Studio's train.json and val.json
        return DataPart(path, source.image_folder())
    images = read_json_object(path).get("images")
    first = images[0] if isinstance(images, list) and images else None
    name = first.get("file_name") if isinstance(first, dict) else None
    part = file.stem.lower().removeprefix("instances_")
    near = [file.absolute().parent, file.absolute().parent.parent]
    places = [place for base in near for place in (base, base / "images", base / part)]
    places += [base / "images" / part for base in near]
    for place in places:
        # The details of an invalid file are reported later, when the file is read.
        if not isinstance(name, str) or (place / name.replace("\\", "/")).is_file():
            return DataPart(path, str(place))
    raise UserError(
        f"Cannot find the images of {file}: {name} is in none of the folders "
        f"{', '.join(map(str, places))}. Specify the image folder: --images FOLDER."
    )
