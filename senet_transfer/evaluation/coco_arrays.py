"""Conversion of COCO ground truth and results to arrays for the diagnostics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from senet_transfer.evaluation.matching import ImageDetections, ImageObjects, Regions
from senet_transfer.evaluation.numbering import in_order


def coco_arrays(
    dataset: Mapping[str, Any],
    results: Iterable[Mapping[str, Any]],
    class_of_category: Mapping[Any, int] | None = None,
    *,
    masks: bool = False,
) -> tuple[list[ImageObjects], list[ImageDetections]]:
    """Return the ground-truth objects and the detections of each image, sorted by image id.

    Ids can be numbers or strings. Objects and detections whose image or category is unknown are
    ignored, as in the COCO metrics.

    Args:
        dataset: The content of an annotation file.
        results: Detections in the COCO results format, with the ids of the annotation file.
        class_of_category: Dictionary from category id to class index. If None, the classes are in
            the order of the category ids.
        masks: If True, return masks instead of boxes.
    """
    images = {image["id"]: image for image in dataset["images"]}
    if class_of_category is None:
        ids = in_order(category["id"] for category in dataset["categories"])
        class_of_category = {key: label for label, key in enumerate(ids)}
    order = in_order(images)
    objects = _by_image(order, dataset["annotations"], class_of_category)
    found = _by_image(order, results, class_of_category)
    return (
        [_objects(objects[key], images[key], class_of_category, masks) for key in order],
        [_detections(found[key], images[key], class_of_category, masks) for key in order],
    )


def _by_image(
    order: Sequence[Any], rows: Iterable[Mapping[str, Any]], classes: Mapping[Any, int]
) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {key: [] for key in order}
    for row in rows:
        if row["image_id"] in groups and row["category_id"] in classes:
            groups[row["image_id"]].append(row)
    return groups


def _objects(
    rows: Sequence[Mapping[str, Any]],
    image: Mapping[str, Any],
    classes: Mapping[Any, int],
    masks: bool,
) -> ImageObjects:
    return ImageObjects(
        regions=_regions(rows, image, masks),
        classes=np.array([classes[row["category_id"]] for row in rows], np.int64),
        crowd=np.array([bool(row.get("iscrowd")) for row in rows], np.bool_),
        areas=np.array(
            [row["area"] if "area" in row else row["bbox"][2] * row["bbox"][3] for row in rows],
            np.float64,
        ),
    )


def _detections(
    rows: Sequence[Mapping[str, Any]],
    image: Mapping[str, Any],
    classes: Mapping[Any, int],
    masks: bool,
) -> ImageDetections:
    return ImageDetections(
        regions=_regions(rows, image, masks),
        classes=np.array([classes[row["category_id"]] for row in rows], np.int64),
        scores=np.array([row["score"] for row in rows], np.float64),
    )


def _regions(rows: Sequence[Mapping[str, Any]], image: Mapping[str, Any], masks: bool) -> Regions:
    if masks:
        return [_mask(row["segmentation"], image) for row in rows]
    return np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)


def _mask(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a COCO segmentation (polygons or RLE) to compressed run-length encoding (RLE)."""
    if isinstance(segmentation, Mapping) and not isinstance(segmentation["counts"], list):
        return dict(segmentation)
    size = image["height"], image["width"]
    encoded = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.merge(encoded) if isinstance(encoded, list) else encoded
