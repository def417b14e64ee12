"""Functions for detecting annotation formats and reading datasets in any supported format.

A path may end with a colon and the name of a split, as in ``voc:train`` or ``data.yaml:val``.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from senet_transfer.data.detection.formats import cvat, labelme, labelstudio, via, voc, yolo
from senet_transfer.data.detection.formats.files import ImageFolder, images_next_to
from senet_transfer.data.detection.formats.records import (
    NOTES,
    SPLIT_NAMES,
    SPLITS,
    ImportedData,
    to_coco,
)
from senet_transfer.data.detection.json_file import read_json_object
from senet_transfer.data.images.listing import walk
from senet_transfer.errors import UserError

# Number of bytes examined at the start of a file.
_HEAD = 4096
_YOLO_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


@dataclass(frozen=True)
class Format:
    """Annotation format and the functions for reading it.

    Attributes:
        title: Name of the format for messages, such as "Pascal VOC".
        image_folder: Function that returns the image folder for an annotation file or folder.
        read: Function that reads an annotation file or folder, given the image folder.
    """

    title: str
    image_folder: Callable[[Path], Path]
    read: Callable[[Path, ImageFolder], ImportedData]


FORMATS = {
    "voc": Format("Pascal VOC", voc.image_folder, voc.read),
    "yolo": Format("YOLO", yolo.image_folder, yolo.read),
    "labelme": Format("LabelMe", labelme.image_folder, labelme.read),
    "cvat": Format("CVAT", images_next_to, cvat.read),
    "labelstudio": Format("Label Studio", images_next_to, labelstudio.read),
    "via": Format("VIA", images_next_to, via.read),
}

# Formats with one file per image.
_FILE_PER_IMAGE = ("voc", "labelme")


@dataclass(frozen=True)
class Source:
    """Files with annotations in a format other than COCO.

    Attributes:
        format: Key of :data:`FORMATS`.
        path: File or folder that the user specified.
        locations: Dictionary from split to the file or folder to read. If the splits are defined in
            the annotation files or there are no splits, the only key is an empty string.
    """

    format: str
    path: Path
    locations: dict[str, Path]

    def image_folder(self) -> str:
        """Return the default image folder for these annotations."""
        if "" in self.locations:
            return os.path.abspath(FORMATS[self.format].image_folder(self.locations[""]))
        return os.path.abspath(self.path)

    def read(
        self, image_dir: str | os.PathLike | None = None, *, upright: bool = True
    ) -> ImportedData:
        """Read the annotations of all splits.

        Args:
            image_dir: The folder with the images; None selects the default image folder.
            upright: Whether the annotations refer to the images with EXIF orientation applied.

        Raises:
            UserError: If a file is invalid.
        """
        root = Path(image_dir or self.image_folder())
        read = FORMATS[self.format].read
        if "" in self.locations:
            return read(self.locations[""], ImageFolder(root, upright=upright))
        whole = ImportedData()
        for split, location in self.locations.items():
            # The images are in the same relative folder as the annotations, in a folder named after
            # the split, or in `root` itself.
            below = os.path.relpath(FORMATS[self.format].image_folder(location), self.path)
            name = os.path.relpath(location, self.path).split(os.sep)[0]
            folders = [root / below] * (not below.startswith(os.pardir)) + [root / name]
            folder = next((path for path in folders if path.is_dir()), root)
            part = read(location, ImageFolder(folder, upright=upright))
            prefix = os.path.relpath(folder, root)
            whole.splits[split] = [image for images in part.splits.values() for image in images]
            for image in whole.splits[split]:
                image.file_name = os.path.normpath(os.path.join(prefix, image.file_name))
            whole.classes += [name for name in part.classes if name not in whole.classes]
            whole.notes += part.notes
            whole.files += part.files
        return whole


def find_source(path: str | os.PathLike, name: str | None = None) -> Source | None:
    """Find the annotation files at a path.

    Args:
        path: A file or folder. A folder may contain one folder per split.
        name: The format, a key of :data:`FORMATS`. If None, the format is detected.

    Returns:
        The format and the files or folders to read; None if no format in :data:`FORMATS` matches.
    """
    path = Path(path)
    if path.is_dir():
        found = _in_folder(path, name)
        if found:
            return Source(found[0], path, {"": found[1]})
        locations = {}
        for folder in sorted(path.iterdir()):
            inner = _in_folder(folder, name) if folder.name.lower() in SPLIT_NAMES else None
            if inner and (name is None or inner[0] == name):
                name = inner[0]
                locations[SPLIT_NAMES[folder.name.lower()]] = inner[1]
        return Source(name, path, locations) if name and locations else None
    if not path.is_file():
        return None
    kind = name or _format_of(path)
    if kind == "voc":
        raise UserError(
            f"{path} is a single Pascal VOC file; expected the dataset's folder, which contains "
            "the XML files. Specify the folder."
        )
    return Source(kind, path, {"": path}) if kind else None


def _in_folder(folder: Path, name: str | None) -> tuple[str, Path] | None:
    """Return a folder's annotation format, and the file or folder to read.

    If ``name`` is not None, only this format is considered. COCO format is not detected. Return
    None if no format is detected.
    """
    if name in ("voc", None) and any((folder / "Annotations").glob("**/*.xml")):
        return "voc", folder
    files = [folder / file for file in next(walk(folder))[2]] if folder.is_dir() else []
    # A YOLO dataset may contain other YAML or JSON files, such as information about the export.
    first = [path for path in files if path.name in _YOLO_FILES]
    for path in first + files:
        kind = _format_of(path) if path.suffix.lower() in _SUFFIXES else None
        if kind and name in (kind, None):
            return kind, folder if kind in _FILE_PER_IMAGE else path
    return None


_SUFFIXES = (".xml", ".json", ".yaml", ".yml")


def _format_of(path: Path) -> str | None:
    """Detect the format of a file from its extension and first bytes.

    Return None for COCO format and for unknown files.
    """
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD).decode("utf-8-sig", "replace").lstrip()
    except OSError:
        return None
    if suffix == ".xml":
        root = re.search(r"<\s*([A-Za-z_][\w.-]*)", head)
        return {"annotation": "voc", "annotations": "cvat"}.get(root[1] if root else "")
    if suffix in (".yaml", ".yml"):
        return "yolo" if re.search(r"^[\"']?names[\"']?\s*:", head, re.MULTILINE) else None
    if head.startswith("["):
        # Files in COCO results format also contain a list.
        results = '"image_id"' in head or '"score"' in head
        return "labelstudio" if re.match(r"\[\s*\{", head) and not results else None
    key = re.match(r'\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*(\{?)', head)
    if key is None or key[1] in ("images", "annotations", "categories", "info", "licenses"):
        return None
    if re.search(r'"(shapes|imagePath)"\s*:', head):
        return "labelme"
    if key[1].startswith("_via_") or (key[2] and re.search(r'"(filename|fileref)"', head)):
        return "via"
    return None


def split_path(path: str | os.PathLike) -> tuple[str, str]:
    """Divide a path such as `data.yaml:val` into the path and the split, which may be empty."""
    path = os.fspath(path)
    before, _, split = path.rpartition(":")
    if split in SPLITS and os.path.exists(before) and not os.path.exists(path):
        return before, split
    return path, ""


def annotations_exist(path: str) -> bool:
    """Return True if an annotation file or folder exists.

    A split at the end of the path, as in ``data.yaml:val``, is removed before the check.
    """
    return os.path.exists(split_path(path)[0])


def default_image_folder(path: str) -> str:
    """Return the folder to which image names are relative if no folder is specified.

    For a COCO annotation file, return the folder that contains the file. For other formats, the
    default folder depends on the format.
    """
    location, _ = split_path(path)
    source = find_source(location)
    return source.image_folder() if source else os.path.dirname(os.path.abspath(location))


def read_annotations(path: str, image_dir: str, *, upright: bool = True) -> dict[str, Any]:
    """Read annotations in any supported format, and convert them to COCO instances format.

    Args:
        path: A file or folder, optionally followed by a colon and the name of a split.
        image_dir: The folder to which the file names are relative.
        upright: Whether the annotations refer to the images with EXIF orientation applied.

    Raises:
        UserError: If a file is invalid, if the path ends with the name of a split that does not
            exist, or if it does not end with the name of a split and there are several splits.
    """
    location, split = split_path(path)
    if find_source(location) is None:
        content = read_json_object(path)
        content.pop(NOTES, None)
        return content
    data = _imported(location, image_dir, upright)
    return to_coco(data, _choose(data, split, location))


def _choose(data: ImportedData, split: str, location: str) -> str:
    if not split and len(data.splits) == 1:
        return next(iter(data.splits))
    if split in data.splits:
        return split
    choices = ", ".join(f"{location}:{name}" for name in data.splits)
    found = f"no split {split!r}" if split else f"{len(data.splits)} splits"
    raise UserError(
        f"{location} contains {found}; expected the path of one split. Specify one of these paths: "
        f"{choices}."
    )


def annotations_state(path: str, image_dir: str, *, upright: bool = True) -> object | None:
    """Return a value that changes whenever the annotation files change.

    Return None if the annotation file or folder does not exist.
    """
    location, _ = split_path(path)
    if not os.path.exists(location):
        return None
    if find_source(location) is None:
        return _state([location])
    return _state(_imported(location, image_dir, upright).files)


def _imported(location: str, image_dir: str, upright: bool) -> ImportedData:
    """Read annotations in a format other than COCO; cache the result until a file changes."""
    data, state = _read(location, image_dir, upright)
    if _state(data.files) != state:
        _read.cache_clear()
        data, _ = _read(location, image_dir, upright)
    return data


# Two entries, for the training and validation data of a run.
@lru_cache(maxsize=2)
def _read(location: str, image_dir: str, upright: bool) -> tuple[ImportedData, object]:
    source = find_source(location)
    assert source is not None
    data = source.read(image_dir, upright=upright)
    return data, _state(data.files)


def _state(paths: list[str]) -> tuple[int, int, int]:
    """Return the number, latest modification time (in ns) and total size of the given files."""
    found = []
    for path in dict.fromkeys(paths):
        try:
            found.append(os.stat(path))
        except OSError:
            continue
    return (
        len(found),
        max((status.st_mtime_ns for status in found), default=0),
        sum(status.st_size for status in found),
    )
