"""Conversion of COCO annotations to Detectron2's dataset dicts.

The result is the same as that of Detectron2's `load_coco_json`, with three differences:

- An object with an invalid segmentation is kept, but without the segmentation.
- If a file name is spelled differently in the annotation file than on disk, such as
  `my%20image.jpg` for `my image.jpg`, the dict contains the name on disk.
- Annotation files with a byte order mark or null values are supported.
"""

import os
from collections import defaultdict

from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from senet_transfer.data.detection.annotation_checks import CocoSummary
from senet_transfer.data.detection.formats.source import read_annotations
from senet_transfer.data.detection.segmentations import segmentation_problem, usable_polygons

_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")


def read_records(
    json_file: str, image_dir: str, summary: CocoSummary, *, upright: bool = True
) -> list[dict]:
    """Read a validated annotation file as a list of Detectron2's dataset dicts.

    Args:
        json_file: Annotation file in COCO instances format, or a file or folder in another
            supported format.
        image_dir: Folder to which the `file_name` entries are relative.
        summary: The file's summary, as returned by ``read_coco_summary``.
        upright: Whether the annotations refer to the images with EXIF orientation applied.

    Returns:
        One dataset dict per image, sorted by image id.
    """
    data = read_annotations(json_file, image_dir, upright=upright)
    by_image = defaultdict(list)
    for item in data.get("annotations") or []:
        by_image[item["image_id"]].append(item)
    records = []
    for image in sorted(data["images"], key=lambda image: image["id"]):
        width, height = image["width"], image["height"]
        objects = [_object(item, width, height, summary.id_map) for item in by_image[image["id"]]]
        name = image["file_name"]
        records.append(
            {
                "file_name": os.path.join(image_dir, summary.renamed.get(name, name)),
                "height": height,
                "width": width,
                "image_id": image["id"],
                "annotations": objects,
            }
        )
    return records


def _object(item: dict, width: int, height: int, id_map: dict[int, int]) -> dict:
    found = {key: item[key] for key in _KEYS if item.get(key) is not None}
    segmentation = item.get("segmentation")
    if segmentation and segmentation_problem(segmentation, width, height) is None:
        if isinstance(segmentation, list):
            segmentation = usable_polygons(segmentation)
        elif isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        found["segmentation"] = segmentation
    points = item.get("keypoints")
    if points:
        # Keypoints are pixel indices, but boxes have continuous coordinates.
        found["keypoints"] = [
            value if index % 3 == 2 else value + 0.5 for index, value in enumerate(points)
        ]
    found["bbox_mode"] = BoxMode.XYWH_ABS
    found["category_id"] = id_map[item["category_id"]]
    return found
