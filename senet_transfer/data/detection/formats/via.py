"""Reader for JSON files of the VGG Image Annotator (VIA), versions 1 and 2.

The file can be an annotation export or a project. Version 1 stores the regions of an image in a
dictionary, version 2 in a list. Circles and ellipses are converted to polygons with 72 points, as
in VIA's own COCO export. Points and polylines have no area and are skipped. The class of a region
is the value of one of the region's attributes. Regions without attributes have the class "object".
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from senet_transfer.data.detection.formats import shapes
from senet_transfer.data.detection.formats.files import (
    ImageFolder,
    label_text,
    number,
    numbers,
    read_json,
)
from senet_transfer.data.detection.formats.records import (
    ImportedData,
    ImportedImage,
    ImportedObject,
    Segmentation,
)
from senet_transfer.errors import UserError

_CLASS_ATTRIBUTES = ("label", "class", "category", "name", "type", "object")
_SKIPPED = ("point", "polyline", "line")


def read(location: Path, images: ImageFolder) -> ImportedData:
    """Read a dataset in VIA format.

    Args:
        location: JSON file with the annotations.
        images: Folder with the images.

    Raises:
        UserError: If the file is invalid.
    """
    data = ImportedData(files=[str(location)])
    content = read_json(location)
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    if not isinstance(content, dict) or not all(map(_is_file, content.values())):
        raise UserError(
            f"{location} is not a file written by VIA 1 or 2; expected an entry with `filename` "
            "and `regions` for each image. Export the annotations as JSON from VIA 2."
        )
    files = {key: _regions(entry, location) for key, entry in content.items()}
    attribute = _class_attribute([r for regions in files.values() for r in regions], location)
    data.splits["train"] = [
        _read_image(content[key], regions, attribute, location, images, data)
        for key, regions in files.items()
    ]
    return data


def _is_file(entry: object) -> bool:
    return isinstance(entry, dict) and "filename" in entry and "regions" in entry


def _regions(entry: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    regions = entry["regions"]
    found = list(regions.values()) if isinstance(regions, dict) else regions
    keys = ("shape_attributes", "region_attributes")
    if not isinstance(found, list) or not all(
        isinstance(r, dict) and all(isinstance(r.get(key), dict) for key in keys) for r in found
    ):
        raise UserError(
            f"{path}: the regions of {str(entry['filename'])[:80]!r} are not valid; expected "
            f"{' and '.join(keys)} for each region. Export the file again."
        )
    return found


def _class_attribute(regions: list[dict[str, Any]], path: Path) -> str | None:
    """Return the name of the attribute that contains the class; None if there are no attributes."""
    counts = Counter(name for region in regions for name in region["region_attributes"])
    if len(counts) <= 1:
        return next(iter(counts), None)
    known = [name for name in counts if name.lower().strip() in _CLASS_ATTRIBUTES]
    if len(known) == 1:
        return known[0]
    raise UserError(
        f"{path}: the regions have the attributes {', '.join(map(repr, counts))}; expected a "
        "single attribute, or exactly one of the following attributes: "
        f"{', '.join(_CLASS_ATTRIBUTES)}. Rename the attribute that contains the class."
    )


def _read_image(
    entry: dict[str, Any], regions: list[dict[str, Any]], attribute: str | None, path: Path,
    images: ImageFolder, data: ImportedData,
) -> ImportedImage:  # fmt: skip
    where = f"{path}: {str(entry['filename'])[:80]!r}"
    file_name = images.name_of(entry["filename"], images.root, where)
    width, height = images.size(file_name, where)
    image = ImportedImage(file_name, width, height, where)
    for index, region in enumerate(regions, 1):
        source = f"{where}, region {index}"
        label = _label(region["region_attributes"], attribute, source)
        shape = _shape(region["shape_attributes"], source, data)
        if shape is not None:
            image.objects.append(ImportedObject(label, shape[0], source, shape[1]))
    return image


def _label(attributes: dict[str, Any], name: str | None, where: str) -> str:
    if name is None:
        return "object"
    value = attributes.get(name)
    if isinstance(value, dict):  # check boxes
        chosen = [key for key, checked in value.items() if checked]
        value = chosen[0] if len(chosen) == 1 else str(chosen)
        if len(chosen) != 1:
            raise UserError(
                f"{where} has the labels {value[:80]}; expected one label. Correct the file."
            )
    return label_text(value, where)


def _shape(
    shape: dict[str, Any], where: str, data: ImportedData
) -> tuple[shapes.Box, Segmentation | None] | None:
    kind = str(shape.get("name"))[:40]
    if kind in _SKIPPED:
        data.notes[f"shapes of type {kind} have no area and are skipped"] += 1
        return None

    def value(name: str) -> float:
        return number(shape.get(name), name, where)

    if kind == "rect":
        left, top = value("x"), value("y")
        return (left, top, left + value("width"), top + value("height")), None
    if kind == "circle":
        return shapes.ellipse(value("cx"), value("cy"), value("r"), value("r"))
    if kind == "ellipse":
        # The angle is in radians. VIA versions before 2.0.8 did not write it.
        degrees = math.degrees(number(shape.get("theta", 0), "theta", where))
        return shapes.ellipse(value("cx"), value("cy"), value("rx"), value("ry"), degrees)
    if kind in ("polygon", "polyshape"):
        xs, ys = (numbers(shape.get(f"all_points_{axis}"), "points", where) for axis in "xy")
        if not xs or len(xs) != len(ys):
            raise UserError(
                f"{where} has {len(xs)} x and {len(ys)} y coordinates; expected one pair per "
                "point. Correct the file."
            )
        return shapes.polygon(list(zip(xs, ys, strict=True)))
    raise UserError(
        f"{where} has the shape {kind!r}; expected rect, circle, ellipse or polygon. Correct the "
        "file."
    )
