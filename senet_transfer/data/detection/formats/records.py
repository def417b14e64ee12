"""Data classes returned by the readers of annotation formats, and conversion to COCO format."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pycocotools import mask as coco_mask

Segmentation = list[list[float]] | dict[str, Any]

# Key for the position in the source file from which an image or annotation was read.
SOURCE = "_source"
# Key for warnings about content that could not be converted.
NOTES = "_notes"

SPLITS = ("train", "val", "test", "trainval")

# Common names of splits, in lower case.
SPLIT_NAMES = {
    **{split: split for split in SPLITS},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}


@dataclass
class ImportedObject:
    """Object read from an annotation file.

    Coordinates are continuous: the top left pixel of an image extends from (0, 0) to (1, 1).

    Attributes:
        label: Class name.
        box: Left, top, right and bottom edges in pixels.
        source: Position in the annotation file, such as "a.xml: object 3", for error messages.
        segmentation: Polygons or a compressed run-length encoding, as in COCO; None for box
            annotations.
        crowd: Whether the annotation is a crowd annotation (`iscrowd`).
    """

    label: str
    box: tuple[float, float, float, float]
    source: str
    segmentation: Segmentation | None = None
    crowd: bool = False


@dataclass
class ImportedImage:
    """Image with its annotated objects.

    Attributes:
        file_name: Path relative to the image folder.
        width: Image width in pixels.
        height: Image height in pixels.
        source: Position in the annotation file, for error messages.
        objects: Annotated objects.
    """

    file_name: str
    width: int
    height: int
    source: str
    objects: list[ImportedObject] = field(default_factory=list)


@dataclass
class ImportedData:
    """Dataset read from annotations in a format other than COCO.

    Attributes:
        splits: Dictionary from split to images. A dataset without splits contains only "train".
        classes: Class names in the order of the category ids. If empty, the classes are the labels
            of all objects in alphabetical order.
        notes: Warnings about the data, such as "masks are empty and are skipped", with the number
            of occurrences of each warning.
        files: All files and folders from which the dataset was read, to detect changes.
    """

    splits: dict[str, list[ImportedImage]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)


def to_coco(data: ImportedData, split: str) -> dict[str, Any]:
    """Convert a split of a dataset to COCO instances format.

    Coordinates are rounded to 0.001 pixels. The categories are the same for all splits.
    """
    labels = {item.label for images in data.splits.values() for i in images for item in i.objects}
    classes = data.classes or sorted(labels)
    ids = {name: number for number, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(data.splits[split], 1):
        images.append(
            {
                "id": number,
                "file_name": image.file_name,
                "width": image.width,
                "height": image.height,
                SOURCE: image.source,
            }
        )
        for item in image.objects:
            annotation = {"id": len(annotations) + 1, "image_id": number, **_annotation(item)}
            annotation["category_id"] = ids[item.label]
            annotations.append(annotation)
    scope = " (in all splits together)" if len(data.splits) > 1 else ""
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        NOTES: [f"{count} {text}{scope}" for text, count in sorted(data.notes.items())],
    }


def _annotation(item: ImportedObject) -> dict[str, Any]:
    left, top, right, bottom = (round(value, 3) for value in item.box)
    box = [left, top, round(right - left, 3), round(bottom - top, 3)]
    segmentation = item.segmentation or []
    if isinstance(segmentation, dict):
        area = float(coco_mask.area(segmentation))
    else:
        segmentation = [[round(value, 3) for value in polygon] for polygon in segmentation]
        area = sum(map(polygon_area, segmentation)) if segmentation else box[2] * box[3]
    return {
        "bbox": box,
        "area": round(area, 3),
        "iscrowd": int(item.crowd),
        "segmentation": segmentation,
        SOURCE: item.source,
    }


def polygon_area(polygon: list[float]) -> float:
    """Return the area of a polygon [x1, y1, x2, y2, ...], using the shoelace formula."""
    xs, ys = polygon[0::2], polygon[1::2]
    following = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in following)) / 2
