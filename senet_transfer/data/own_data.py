"""Search for the training and validation data below a path that a user names."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from senet_transfer.data.build import find_dataset
from senet_transfer.data.detection.json_file import read_json_object
from senet_transfer.data.images import places365
from senet_transfer.data.shards.storage import is_remote
from senet_transfer.errors import UserError

# Names of the folders and files of each part, in lower case.
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation")

_COCO_NAMES = "_annotations.coco.json", "annotations.json"


class DataPart(NamedTuple):
    """Training or validation data.

    Attributes:
        path: JSON file in COCO format, or the path or address of labelled images.
        image_dir: Folder with the images of a JSON file; empty for classification data.
    """

    path: str
    image_dir: str = ""


def find_parts(path: str, val: str = "", image_dir: str = "") -> tuple[DataPart, DataPart | None]:
    """Find the training and validation data of a data set for detection or classification.

    Args:
        path: JSON file in COCO format; folder that contains such files for the parts, as
            `train.json`, `train/_annotations.coco.json` or `annotations/instances_train*.json`; or
            labelled images as in `DATASETS.TRAIN` of a classifier, or a folder that contains them
            in the folders `train` and `val`.
        val: The same for the validation data; empty to search for it in `path`.
        image_dir: Image folder of the JSON files; empty to search for it next to them.

    Returns:
        The training data, and the validation data or None.

    Raises:
        UserError: If no data is found, or the two parts are of different kinds.
    """
    train = _find(path, image_dir, TRAIN_NAMES) or _whole(path, image_dir)
    found = _find(val or path, image_dir, VAL_NAMES)
    if val and found is None:
        found = _whole(val, image_dir)
    if found and bool(found.image_dir) != bool(train.image_dir):
        kinds = ["detection" if part.image_dir else "classification" for part in (train, found)]
        raise UserError(
            f"{train.path} is data for {kinds[0]}, but {found.path} is data for {kinds[1]}; "
            "expected the same kind of data for training and validation. Correct --data or --val."
        )
    return train, found


def _find(path: str, image_dir: str, names: Iterable[str]) -> DataPart | None:
    """Return one part of the data in a folder, or None if the path is that of a single part."""
    folder = Path(path).expanduser()
    if is_remote(path) or not folder.is_dir():
        return None
    for name in names:
        # Windows and macOS ignore case in file names.
        entries = {entry.name.lower(): entry for entry in folder.iterdir()}
        pattern = re.compile(rf"(instances_)?{name}\d*\.json")
        annotations = entries.get("annotations", folder)
        listed = sorted(annotations.iterdir()) if annotations.is_dir() else []
        files = [entries.get(f"{name}.json")]
        files += [Path(folder, name, coco) for coco in _COCO_NAMES]
        files += [file for file in listed if pattern.fullmatch(file.name.lower())]
        for file in files:
            if file and file.is_file():
                return DataPart(str(file.absolute()), _image_dir(file, image_dir))
        if name in entries and entries[name].is_dir():
            return DataPart(str(entries[name].absolute()))
    split = "val" if "val" in names else "train_standard"
    if places365.has_lists(folder, split):
        return DataPart(find_dataset(path))
    return None


def _whole(path: str, image_dir: str) -> DataPart:
    """Return the data at a path that is not divided into parts."""
    folder = Path(path).expanduser()
    files = [folder] if folder.suffix.lower() == ".json" else [folder / n for n in _COCO_NAMES]
    for file in files:
        if file.is_file():
            return DataPart(str(file.absolute()), _image_dir(file, image_dir))
    return DataPart(find_dataset(path))


def _image_dir(file: Path, image_dir: str) -> str:
    """Return the folder to which the file names in a JSON file are relative.

    Raises:
        UserError: If the first image is in none of the usual folders.
    """
    if image_dir:
        return os.path.abspath(os.path.expanduser(image_dir))
    images = read_json_object(str(file)).get("images")
    first = images[0] if isinstance(images, list) and images else None
    name = first.get("file_name") if isinstance(first, dict) else None
    part = file.stem.lower().removeprefix("instances_")
    near = [file.absolute().parent, file.absolute().parent.parent]
    places = [place for base in near for place in (base, base / "images", base / part)]
    places += [base / "images" / part for base in near]
    if not isinstance(name, str):
        # The file is invalid, which is reported with its details when it is read.
        return str(places[0])
    for place in places:
        if (place / name.replace("\\", "/")).is_file():
            return str(place)
    raise UserError(
        f"The images of {file} are not found: {name} is in none of the folders "
        f"{', '.join(map(str, places))}. Give their folder: --images FOLDER."
    )
