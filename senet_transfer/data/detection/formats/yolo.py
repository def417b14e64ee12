"""Reader for the YOLO format: a `data.yaml` with classes and splits, and a label file per image.

Each line of a label file contains a class index and either a box (centre, width and height) or the
points of a polygon, as fractions of the image size. Pixel coordinates are not rounded to whole
pixels. An image without a label file, or with an empty one, has no objects.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from senet_transfer.data.detection.formats import shapes
from senet_transfer.data.detection.formats.files import (
    ImageFolder,
    list_files,
    number,
    read_text,
    shown,
)
from senet_transfer.data.detection.formats.records import (
    ImportedData,
    ImportedImage,
    ImportedObject,
)
from senet_transfer.data.images.file_types import is_image_name
from senet_transfer.errors import UserError

_KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}

# Tools round to five or six decimals, and some write boxes that extend slightly beyond the image.
_TOLERANCE = 0.01


def image_folder(location: Path) -> Path:
    """Return the folder to which the paths of the splits are relative.

    If `path` in the YAML file specifies an existing folder, return that folder. Otherwise, return
    the folder of the YAML file.
    """
    path = _content(location).get("path")
    if isinstance(path, str) and path.strip():
        root = Path(os.path.normpath(location.parent / os.path.expanduser(path)))
        if root.is_dir():
            return root
    return location.parent


def read(location: Path, images: ImageFolder) -> ImportedData:
    """Read a dataset in YOLO format.

    Args:
        location: The dataset's YAML file.
        images: Folder that contains the images of all splits.

    Raises:
        UserError: If a file is invalid.
    """
    content = _content(location)
    data = ImportedData(classes=_class_names(content, location), files=[str(location)])
    root, missing = image_folder(location), 0
    for key, split in _KEYS.items():
        entries = content.get(key)
        if not entries or split in data.splits:
            continue
        listed = _split_images(entries, key, location, root, images, data)
        found = [_read_image(name, images, data, _key_points(content, location)) for name in listed]
        data.splits[split] = [image for image, _ in found]
        missing += sum(not labelled for _, labelled in found)
    names = [image.file_name for split in data.splits.values() for image in split]
    if not names:
        raise UserError(
            f"{location} has none of the keys train, val and test; expected at least one of them, "
            "with the path of an image folder. Add the keys to the file."
        )
    if missing == len(names):
        raise UserError(
            f"{location}: none of the {missing} images has a label file; expected, for example, "
            f"{_label_path(images, names[0])}. Check the paths `train`, `val` and `test` in the "
            "file, and the location of the label files."
        )
    if missing:
        data.notes["images have no label file and are used as images without objects"] = missing
    return data


def _content(path: Path) -> dict:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML ({error}). Correct the file.") from None
    if not isinstance(content, dict) or "names" not in content:
        raise UserError(
            f"{path} has no key `names`; expected the class names of a YOLO dataset and the keys "
            "`train`, `val` and `test`. Specify the dataset's data.yaml."
        )
    return content


def _class_names(content: dict, path: Path) -> list[str]:
    names = content["names"]
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        by_index = {int(index): name for index, name in names.items()}
        names = [by_index[index] for index in range(len(by_index))]
    expected = "a list of names, or names by index 0, 1, ..."
    valid = isinstance(names, list) and names
    # YAML parses unquoted words such as yes and no as booleans.
    if not valid or any(isinstance(n, bool) or not isinstance(n, str | int | float) for n in names):
        raise UserError(
            f"{path}: `names` is not valid; expected {expected}. Put names such as yes and no in "
            "quotation marks, because YAML reads them as booleans."
        )
    count = content.get("nc", len(names))
    if count != len(names):
        raise UserError(
            f"{path}: `nc` is {shown(count)}, but `names` contains {len(names)} names; expected "
            "the same number. Correct the file."
        )
    return [str(name) for name in names]


def _key_points(content: dict, path: Path) -> int:
    """Return the number of keypoint values in each line of a label file.

    For 17 keypoints with x, y and visibility, this is 51. For a dataset without keypoints, it is 0.
    """
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int for n in shape):
        raise UserError(
            f"{path}: `kpt_shape` is {shown(shape)}; expected two integers, the number of "
            "keypoints and the number of values per keypoint. Correct the file."
        )
    return shape[0] * shape[1]


def _split_images(
    entries: Any, key: str, location: Path, root: Path, images: ImageFolder, data: ImportedData
) -> list[str]:
    """Return the paths of a split's images, relative to the image folder."""
    where = f"{location}: `{key}`"
    found: dict[str, None] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        path = Path(images.root, images.name_of(_existing(entry, root), root, where))
        data.files.append(str(path))
        if path.is_dir():
            listed = [path / name for name in list_files(path, is_image_name)]
        elif path.suffix == ".txt" and path.is_file():
            lines = [line.strip() for line in read_text(path).splitlines()]
            # As in Ultralytics' reader, "./" refers to the folder of the list.
            listed = [
                (path.parent if line.startswith("./") else root) / line for line in lines if line
            ]
        else:
            raise UserError(
                f"{where} is {str(entry)[:80]!r}, but {path} does not exist; expected a folder "
                "with images or a text file that lists them. Correct the path."
            )
        for name in listed:
            found[images.name_of(str(name), root, str(path))] = None
    if not found:
        raise UserError(f"{where} contains no images. Correct the path, or remove the key.")
    return list(found)


def _existing(entry: Any, root: Path) -> Any:
    """Remove a leading `../` from a path that does not exist.

    Roboflow writes `../train/images` for the folder `train/images` next to the YAML file.
    """
    if isinstance(entry, str) and entry.startswith("../"):
        return entry if (root / entry).exists() else entry[3:]
    return entry


def _label_path(images: ImageFolder, name: str) -> str:
    path = os.path.splitext(os.path.join(images.root, name))[0] + ".txt"
    before, middle, after = path.rpartition(f"{os.sep}images{os.sep}")
    return f"{before}{os.sep}labels{os.sep}{after}" if middle else path


def _read_image(
    name: str, images: ImageFolder, data: ImportedData, key_points: int
) -> tuple[ImportedImage, bool]:
    """Return an image with its objects, and whether its label file exists."""
    path = _label_path(images, name)
    width, height = images.size(name, path)
    image = ImportedImage(name, width, height, path)
    if not os.path.isfile(path):
        data.files.append(os.path.dirname(path))
        return image, False
    data.files.append(path)
    for index, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            item = _read_line(line.split(), f"{path}: line {index}", data, key_points)
            left, top, right, bottom = item.box
            item.box = left * width, top * height, right * width, bottom * height
            if item.segmentation:
                assert isinstance(item.segmentation, list)
                item.segmentation = [
                    [v * (height if i % 2 else width) for i, v in enumerate(points)]
                    for points in item.segmentation
                ]
            image.objects.append(item)
    return image, True


def _read_line(words: list[str], where: str, data: ImportedData, key_points: int) -> ImportedObject:
    """Read an object from a label file's line, with coordinates as fractions of the image size."""
    values = [number(word, "value", where) for word in words]
    index = values.pop(0)
    if index != int(index) or not 0 <= index < len(data.classes):
        raise UserError(
            f"{where} has the class {words[0]}; expected an integer from 0 to "
            f"{len(data.classes) - 1}, an index into `names` in {data.files[0]}. Correct the line."
        )
    label = data.classes[int(index)]
    if key_points and len(values) == 4 + key_points:
        data.notes["objects have keypoints, but only their box is read"] += 1
        values = values[:4]
    if len(values) == 5:
        raise UserError(
            f"{where} has 6 values, as in a prediction with a confidence; expected the class and a "
            "box (x y width height) or at least three points. Use labels instead of predictions."
        )
    if len(values) < 4 or (len(values) > 4 and len(values) % 2):
        raise UserError(
            f"{where} has {len(words)} values; expected the class and a box (x y width height) or "
            "at least three points. Correct the line."
        )
    if min(values) < -_TOLERANCE or max(values) > 1 + _TOLERANCE:
        raise UserError(
            f"{where} has the coordinates {' '.join(words[1:7])[:60]}; expected fractions of the "
            "image size from 0 to 1, not pixels. Correct the line."
        )
    if len(values) > 4:
        box, segmentation = shapes.polygon(list(zip(values[0::2], values[1::2], strict=True)))
        return ImportedObject(label, box, where, segmentation)
    x, y, width, height = values
    box = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return ImportedObject(label, box, where)
