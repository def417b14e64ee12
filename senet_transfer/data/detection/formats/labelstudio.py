"""Reader for Label Studio's JSON and JSON-MIN exports.

Coordinates are percentages of the image size. Rotations are clockwise, in pixel coordinates: a
rectangle is rotated around its top left corner, an ellipse around its centre. If a task has several
annotations, only the latest is read. Predictions and tasks without an annotation are skipped.
"""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from senet_transfer.data.detection.formats import shapes
from senet_transfer.data.detection.formats.files import (
    ImageFolder,
    image_sides,
    label_text,
    number,
    points,
    read_json,
)
from senet_transfer.data.detection.formats.records import (
    ImportedData,
    ImportedImage,
    ImportedObject,
    Segmentation,
)
from senet_transfer.data.images.file_types import is_image_name
from senet_transfer.errors import UserError

_LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
_SKIPPED = ("brush", "keypoint", "vector", "video")


def read(location: Path, images: ImageFolder) -> ImportedData:
    """Read a dataset exported by Label Studio.

    Args:
        location: JSON file with the annotations.
        images: Folder with the images.

    Raises:
        UserError: If the file is invalid.
    """
    data = ImportedData(splits={"train": []}, files=[str(location)])
    tasks = read_json(location)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise UserError(
            f"{location} does not contain a list of tasks; expected Label Studio's JSON export. "
            "Check the path and the format."
        )
    for index, task in enumerate(tasks, 1):
        where = f"{location}: task {task.get('id', index)}"
        regions = _regions(task, where, data)
        if regions is None:
            data.notes["tasks have no annotation and are skipped"] += 1
            continue
        data.splits["train"].append(_read_image(task, regions, where, images, data))
    return data


def _regions(task: dict[str, Any], where: str, data: ImportedData) -> list[dict] | None:
    """Return the regions of a task's latest annotation, or None if the task is not annotated."""
    if "data" not in task:  # JSON-MIN: the regions are in a list under the name of the tag
        found = [part for value in task.values() if isinstance(value, list) for part in value]
        found = [part for part in found if isinstance(part, dict)]
        return [{"value": part, **part} for part in found]
    annotations = task.get("annotations", task.get("completions"))
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise UserError(
            f"{where} contains no valid `annotations` list; expected Label Studio's JSON export. "
            "Export the data again."
        )
    valid = [a for a in annotations if not a.get("was_cancelled") and not a.get("skipped")]
    if not valid:
        return None
    if len(valid) > 1:
        data.notes["tasks have several annotations, and only the last one is read"] += 1
    last = max(reversed(valid), key=lambda a: str(a.get("updated_at") or a.get("created_at") or ""))
    regions = last.get("result")
    if not isinstance(regions, list) or not all(isinstance(r, dict) for r in regions):
        raise UserError(f"{where}: an annotation has no `result` list. Export the data again.")
    return regions


def _read_image(
    task: dict[str, Any], regions: list[dict], where: str, images: ImageFolder, data: ImportedData
) -> ImportedImage:
    file_name = _find_image(task.get("data", task), where, images)
    sides = [(r.get("original_width"), r.get("original_height")) for r in regions]
    known = next((pair for pair in sides if None not in pair), None)
    width, height = image_sides(*known, where) if known else images.size(file_name, where)
    image = ImportedImage(file_name, width, height, where)
    for index, region in enumerate(regions, 1):
        item = _read_region(region, regions, f"{where}, region {index}", (width, height), data)
        image.objects += [item] if item else []
    return image


def _find_image(values: Any, where: str, images: ImageFolder) -> str:
    """Return the path of a task's image relative to the image folder.

    The URL of an image may contain a server address and folders that do not exist locally.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{where} has no `data` object; expected Label Studio's JSON export. Export the data "
            "again."
        )
    texts = {key: value for key, value in values.items() if isinstance(value, str)}
    if "image" in texts:
        texts = {"image": texts["image"]}
    paths = [path for path in map(_url_path, texts.values()) if is_image_name(path)]
    if len(paths) != 1:
        raise UserError(
            f"{where} has {len(paths)} images ({', '.join(paths[:3])}); expected one image. Export "
            "a project in which each task has one image."
        )
    parts = [part for part in paths[0].replace("\\", "/").split("/") if part]
    if ".." in parts:
        raise UserError(
            f"{where} specifies the image {paths[0]!r}; expected a path without `..`. Correct the "
            "file."
        )
    names = [os.path.join(*parts[start:]) for start in range(len(parts))]
    # Label Studio prepends eight characters to the names of uploaded files.
    names.append(re.sub(r"^[0-9a-f]{8}-", "", parts[-1]))
    return next((name for name in names if images.exists(name)), parts[-1])


def _url_path(text: str) -> str:
    parts = urlsplit(text) if "\0" not in text else urlsplit("")
    local = parse_qs(parts.query).get("d")  # /data/local-files/?d=folder/image.jpg
    return local[0] if local else unquote(parts.path)


def _read_region(
    region: dict[str, Any], regions: list[dict], where: str, size: tuple[int, int],
    data: ImportedData,
) -> ImportedObject | None:  # fmt: skip
    """Convert a region to an object; return None if it has no label or an unsupported shape."""
    value, kind = region.get("value"), str(region.get("type", ""))
    if not isinstance(value, dict):
        raise UserError(
            f"{where} has no `value` object, which specifies the shape. Export the file again."
        )
    names = _names(value)
    if kind.startswith(_SKIPPED) or any(key.startswith(_SKIPPED) for key in value):
        data.notes["brush masks, keypoints and other unsupported regions are skipped"] += 1
        return None
    if kind in ("rectangle", "polygon", "ellipse") and not names:
        # The label of such a shape is in a second region with the same id.
        same = (r for r in regions if r is not region and r.get("id") == region.get("id"))
        if any(_names(r.get("value")) for r in same):
            return None
        data.notes["regions have no label and are skipped"] += 1
    shape = _shape(value, where, size)
    if not names or shape is None:
        return None
    if region.get("image_rotation"):
        raise UserError(
            f"{where} was drawn on an image that was rotated by {region['image_rotation']} degrees "
            "in Label Studio, which is not supported. Rotate the image file and label it again."
        )
    if len(names) > 1:
        data.notes["regions have several labels, and only the first one is read"] += 1
    return ImportedObject(label_text(names[0], where), shape[0], where, shape[1])


def _names(value: object) -> list[Any]:
    """Return the labels of a region, given its `value`; an empty list if it has no labels."""
    for key in _LABELS:
        found = value.get(key) if isinstance(value, dict) else None
        if isinstance(found, list) and found:
            return found
    return []


def _shape(
    value: dict[str, Any], where: str, size: tuple[int, int]
) -> tuple[shapes.Box, Segmentation | None] | None:
    """Return a region's box and segmentation in pixels; None if its shape is not supported."""
    x_unit, y_unit = size[0] / 100, size[1] / 100

    def pixels(name: str) -> float:
        unit = x_unit if name in ("x", "width", "radiusX") else y_unit
        return number(value.get(name), name, where) * unit

    degrees = number(value.get("rotation") or 0, "rotation", where)
    if "points" in value:
        corners = points(value["points"], "points", where)
        return shapes.polygon([(x * x_unit, y * y_unit) for x, y in corners])
    if "radiusX" in value:
        return shapes.ellipse(
            pixels("x"), pixels("y"), pixels("radiusX"), pixels("radiusY"), degrees
        )
    if "width" in value:
        left, top = pixels("x"), pixels("y")
        box = left, top, left + pixels("width"), top + pixels("height")
        return shapes.rotated_box(box, degrees, pivot=(left, top))
    return None
