"""Reader for CVAT's XML formats for images and videos (version 1.1).

Rotated boxes and ellipses are converted to polygons with bounding boxes. Polylines, points,
cuboids, skeletons and tags have no equivalent in COCO format and are skipped. CVAT exports a
track's box for every frame, so boxes do not have to be interpolated. Boxes with `outside="1"` are
not visible and are skipped.
"""

import re
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from senet_transfer.data.detection.formats import shapes
from senet_transfer.data.detection.formats.files import (
    ImageFolder,
    image_sides,
    list_files,
    number,
    read_xml,
    shown,
)
from senet_transfer.data.detection.formats.records import (
    SPLIT_NAMES,
    ImportedData,
    ImportedImage,
    ImportedObject,
    Segmentation,
)
from senet_transfer.data.images.file_types import is_image_name
from senet_transfer.errors import UserError

_SKIPPED = ("polyline", "points", "cuboid", "skeleton", "tag")
_FRAME = re.compile(r"frame_(\d{1,12})\.\w+")
_SIDES = ("xtl", "ytl", "xbr", "ybr")


def read(location: Path, images: ImageFolder) -> ImportedData:
    """Read a dataset in CVAT format.

    Args:
        location: XML file with the annotations.
        images: Folder with the images.

    Raises:
        UserError: If a file is invalid.
    """
    root = read_xml(location)
    if root.tag != "annotations":
        raise UserError(
            f"{location} has the root element <{root.tag}>; expected <annotations>, as in CVAT's "
            "XML. Check the path and the format."
        )
    labels = [
        label for label in root.iterfind("meta//labels/label") if not label.findtext("parent")
    ]
    names = [(label.findtext("name") or "").strip() for label in labels]
    data = ImportedData(classes=list(dict.fromkeys(names)), files=[str(location)])
    for element in root.iterfind("image"):
        subset = element.get("subset", "train").lower()
        split = SPLIT_NAMES.get(subset, "train")
        if subset not in (*SPLIT_NAMES, "default"):
            data.notes[f"images are in the subset {shown(subset)}, which is read as train"] += 1
        data.splits.setdefault(split, []).append(_read_image(element, location, images, data))
    if root.find("track") is not None:
        data.files.append(images.root)
        data.splits.setdefault("train", []).extend(_read_frames(root, location, images, data))
    return data


def _read_image(
    element: Element, path: Path, images: ImageFolder, data: ImportedData
) -> ImportedImage:
    where = f"{path}: image {element.get('name')!r}"
    width, height = image_sides(element.get("width"), element.get("height"), where)
    file_name = images.name_of(element.get("name"), images.root, where)
    image = ImportedImage(file_name, width, height, where)
    for index, shape in enumerate(element, 1):
        image.objects += _read_shape(shape, f"{where}, shape {index}", (width, height), data)
    return image


def _read_frames(
    root: Element, path: Path, images: ImageFolder, data: ImportedData
) -> list[ImportedImage]:
    """Return the frames of a video with the objects of all tracks.

    The image files must be named `frame_000000.PNG` and so on, as exported by CVAT.
    """
    size = root.find("meta//original_size")
    sides = (size.findtext("width"), size.findtext("height")) if size is not None else (None, None)
    width, height = image_sides(*sides, f"{path}: <original_size>")
    frames: dict[int, list[ImportedObject]] = {}
    for index, track in enumerate(root.iterfind("track"), 1):
        for shape in track:
            where = f"{path}: track {index}, frame {shape.get('frame')!r}"
            frame = int(number(shape.get("frame"), "frame", where))
            shape.attrib.setdefault("label", track.get("label", ""))
            found = frames.setdefault(frame, [])
            if shape.get("outside") != "1":
                found += _read_shape(shape, where, (width, height), data)
    names = list_files(images.root, is_image_name)
    by_frame = {int(m[1]): m[0] for m in map(_FRAME.fullmatch, names) if m}
    lacking = sorted(frame for frame, found in frames.items() if found and frame not in by_frame)
    if lacking:
        raise UserError(
            f"{path} contains objects in frame {lacking[0]}, but {images.root} contains no image "
            f"named frame_{lacking[0]:06d}; expected the video frames that CVAT exports with the "
            "annotations. Extract the frames, and name the files frame_000000.png and so on."
        )
    # Frames without tracks become images without objects.
    return [
        ImportedImage(name, width, height, str(path), frames.get(frame, []))
        for frame, name in by_frame.items()
    ]


def _read_shape(
    shape: Element, where: str, size: tuple[int, int], data: ImportedData
) -> list[ImportedObject]:
    """Convert a shape to a list with one object; the list is empty if the shape is skipped."""
    if shape.tag in _SKIPPED:
        data.notes[f"shapes of type {shape.tag} are skipped"] += 1
        return []
    label = shape.get("label", "").strip()
    if not label or (data.classes and label not in data.classes):
        raise UserError(
            f"{where} has the label {label[:40]!r}; expected one of the labels in <meta>: "
            f"{', '.join(data.classes[:10])}. Correct the file."
        )
    values = {name: _value(shape, name, where) for name in _numeric(shape.tag)}
    rotation = float(number(shape.get("rotation", "0"), "rotation", where))
    found: tuple[shapes.Box, Segmentation | None] | None
    if shape.tag == "box":
        box = values["xtl"], values["ytl"], values["xbr"], values["ybr"]
        found = shapes.rotated_box(box, rotation)
    elif shape.tag == "polygon":
        found = shapes.polygon(_points(shape.get("points", ""), where))
    elif shape.tag == "ellipse":
        found = shapes.ellipse(values["cx"], values["cy"], values["rx"], values["ry"], rotation)
    elif shape.tag == "mask":
        found = _mask(shape, values, where, size)
    else:
        raise UserError(
            f"{where} is a <{shape.tag}>; expected a CVAT shape, such as <box>. Correct the file."
        )
    if found is None:
        data.notes["masks are empty and are skipped"] += 1
        return []
    if rotation % 360 and shape.tag == "box":
        data.notes["boxes are rotated and become polygons"] += 1
    return [ImportedObject(label, found[0], where, found[1])]


def _numeric(tag: str) -> tuple[str, ...]:
    kinds = {"box": _SIDES, "ellipse": ("cx", "cy", "rx", "ry")}
    return kinds.get(tag, ("left", "top", "width", "height") if tag == "mask" else ())


def _value(shape: Element, name: str, where: str) -> float:
    return number(shape.get(name), name, where)


def _points(text: str, where: str) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in text.split(";") if pair.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{where} contains the invalid points {text[:40]!r}; expected x,y pairs separated by "
            "semicolons. Correct the file."
        )
    return [(number(x, "point", where), number(y, "point", where)) for x, y in pairs]


def _mask(
    shape: Element, values: dict[str, float], where: str, size: tuple[int, int]
) -> tuple[shapes.Box, Segmentation] | None:
    """Decode a mask from CVAT's row-major run-length encoding, which starts with background."""
    left, top, width, height = (int(values[name]) for name in ("left", "top", "width", "height"))
    text = shape.get("rle", "")
    valid = re.fullmatch(r"[0-9,\s]+", text) and not re.search(r"[0-9]{10}", text)
    runs = [int(run) for run in re.findall(r"[0-9]+", text)] if valid else []
    inside = min(left, top) >= 0 and left + width <= size[0] and top + height <= size[1]
    if not inside or min(width, height) < 1 or sum(runs) != width * height:
        raise UserError(
            f"{where} is a mask of {width} x {height} pixels at ({left}, {top}), whose run lengths "
            f"add up to {sum(runs)} pixels; expected run lengths that cover the mask exactly, and "
            f"a mask inside the image of {size[0]} x {size[1]} pixels. Correct or remove the mask."
        )
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    return shapes.mask(pixels, left, top, *size)
