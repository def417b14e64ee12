"""Reader for the LabelMe format, which has one JSON file per image.

Shapes with the same label and `group_id` are merged into one object, as in LabelMe's COCO
conversion. Polygons, rotated rectangles, circles and masks are converted to segmentations with
bounding boxes; other rectangles are converted to boxes only. Points and lines have no area and are
skipped.
"""

import base64
import binascii
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from senet_transfer.data.detection.formats import shapes
from senet_transfer.data.detection.formats.files import (
    ImageFolder,
    image_sides,
    label_text,
    list_files,
    points,
    read_json,
)
from senet_transfer.data.detection.formats.records import (
    ImportedData,
    ImportedImage,
    ImportedObject,
    Segmentation,
)
from senet_transfer.errors import UserError

_SKIPPED = ("line", "linestrip", "point", "points")
# "rotation" is written by X-AnyLabeling, which uses LabelMe's format.
_POLYGONS = ("polygon", "oriented_rectangle", "rotation", "", None)


def image_folder(location: Path) -> Path:
    """Return the folder that contains both the JSON files and the images."""
    return location if location.is_dir() else location.parent


def read(location: Path, images: ImageFolder) -> ImportedData:
    """Read a dataset in LabelMe format.

    Args:
        location: Folder with JSON files, or a single file.
        images: Folder that contains the images.

    Raises:
        UserError: If a file is invalid.
    """
    data = ImportedData(splits={"train": []})
    paths = [location]
    if location.is_dir():
        names = list_files(location, lambda name: name.lower().endswith(".json"))
        paths = [location / name for name in names]
        data.files.append(str(location))
    for path in paths:
        data.files.append(str(path))
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            if len(paths) == 1:
                raise UserError(
                    f"{path} has no `shapes` list; expected a file in LabelMe format. Check the "
                    "path and the format."
                )
            data.notes["JSON files are not in LabelMe format and are skipped"] += 1
            continue
        data.splits["train"].append(_read_image(path, content, images, data))
    return data


def _read_image(
    path: Path, content: dict[str, Any], images: ImageFolder, data: ImportedData
) -> ImportedImage:
    file_name = images.name_of(content.get("imagePath"), path.parent, str(path))
    if not images.exists(file_name):
        # The image may have been renamed together with its JSON file.
        stem = os.path.relpath(path.with_suffix(""), images.root)
        file_name = images.with_stem(stem) or images.with_stem(path.stem) or file_name
    sides = content.get("imageWidth"), content.get("imageHeight")
    if sides == (None, None):
        width, height = images.size(file_name, str(path))
    else:
        width, height = image_sides(*sides, str(path))
    image = ImportedImage(file_name, width, height, str(path))
    groups: dict[tuple[str, str], ImportedObject] = {}
    for index, shape in enumerate(content["shapes"], 1):
        where = f"{path}: shape {index}"
        if not isinstance(shape, dict):
            raise UserError(
                f"{where} is {str(shape)[:40]!r}; expected a JSON object {{...}}. Correct the file."
            )
        item = _read_shape(shape, where, (width, height), data)
        if item is None:
            continue
        group = shape.get("group_id")
        earlier = groups.setdefault((item.label, str(group)), item) if group is not None else item
        if earlier is item:
            image.objects.append(item)
        else:
            _merge(earlier, item, data)
    return image


def _read_shape(
    shape: dict[str, Any], where: str, size: tuple[int, int], data: ImportedData
) -> ImportedObject | None:
    label, kind = label_text(shape.get("label"), where), shape.get("shape_type")
    if kind in _SKIPPED:
        data.notes[f"shapes of type {kind} have no area and are skipped"] += 1
        return None
    corners = points(shape.get("points"), "points", where)
    if kind in _POLYGONS:
        return ImportedObject(label, *_with_source(shapes.polygon(corners), where))
    if kind not in ("rectangle", "circle", "mask"):
        raise UserError(
            f"{where} has the shape_type {str(kind)[:40]!r}; expected a LabelMe shape, such as "
            "polygon or rectangle. Correct the file."
        )
    # LabelMe 4 wrote rectangles with two corners; other tools write all four corners.
    if len(corners) != 2 and not (kind == "rectangle" and len(corners) == 4):
        raise UserError(
            f"{where} is a {kind} with {len(corners)} points; expected 2. Correct the file."
        )
    if kind == "rectangle":
        return ImportedObject(label, shapes.box_of(corners), where)
    if kind == "circle":
        (x, y), (edge_x, edge_y) = corners
        radius = float(np.hypot(edge_x - x, edge_y - y))
        return ImportedObject(label, *_with_source(shapes.ellipse(x, y, radius, radius), where))
    found = _read_mask(shape.get("mask"), corners, where, size)
    if found is None:
        data.notes["masks are empty and are skipped"] += 1
        return None
    return ImportedObject(label, *_with_source(found, where))


def _with_source(
    found: tuple[shapes.Box, Segmentation | None], where: str
) -> tuple[shapes.Box, str, Segmentation | None]:
    return found[0], where, found[1]


def _read_mask(
    text: object, corners: Sequence[tuple[float, float]], where: str, size: tuple[int, int]
) -> tuple[shapes.Box, Segmentation] | None:
    """Read a mask from a base64-encoded PNG image of the region between two corners (inclusive)."""
    (left, top), (right, bottom) = [(int(x), int(y)) for x, y in corners]
    expected = right - left + 1, bottom - top + 1
    try:
        image = Image.open(io.BytesIO(base64.b64decode(str(text), validate=True)), formats=["PNG"])
        inside = 0 <= left <= right < size[0] and 0 <= top <= bottom < size[1]
        if inside and image.size == expected:
            return shapes.mask(np.asarray(image.convert("L")) > 0, left, top, *size)
        found = f"of {image.size[0]} x {image.size[1]} pixels"
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        found = f"that can't be read ({error})"
    raise UserError(
        f"{where} has a mask {found}; expected a base64-encoded PNG image of {expected[0]} x "
        f"{expected[1]} pixels, the size of the shape's bounding box. The two points of the shape "
        "are the corners of the box, and must be inside the image. Correct or remove the shape."
    )


def _merge(item: ImportedObject, other: ImportedObject, data: ImportedData) -> None:
    """Merge another shape of the same group into an object."""
    item.box = shapes.box_of([item.box[:2], item.box[2:], other.box[:2], other.box[2:]])
    both = item.segmentation, other.segmentation
    if all(isinstance(segmentation, list) for segmentation in both):
        item.segmentation = [*both[0], *both[1]]  # type: ignore[misc]
    elif both != (None, None):
        item.segmentation = None
        data.notes["groups contain rectangles or masks, so only the group's box is read"] += 1
