"""Conversion of a model's predictions to annotations in COCO format."""

from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances, RotatedBoxes
from pycocotools import mask as mask_util


def objects(output: dict[str, Any], threshold: float) -> Instances | None:
    """Return the objects in a model's output for an image.

    The proposals of a region proposal network become objects of class 0. Their scores are the
    sigmoid of the objectness logits.

    Args:
        output: The output of any of Detectron2's meta-architectures.
        threshold: The minimum score.

    Returns:
        The objects, or None if the model does not predict objects or proposals.
    """
    if "instances" in output:
        found = output["instances"].to("cpu")
    elif "proposals" in output:
        proposals = output["proposals"].to("cpu")
        found = Instances(
            proposals.image_size,
            pred_boxes=proposals.proposal_boxes,
            scores=proposals.objectness_logits.sigmoid(),
        )
        found.pred_classes = found.scores.new_zeros(len(found)).long()
    else:
        return None
    return found[found.scores >= threshold]


def object_annotations(found: Instances, image_id: int) -> list[dict[str, Any]]:
    """Return COCO annotations of objects, with the class index as ``category_id``.

    The ``area`` is that of the mask or, without masks, of the box. A rotated box has five values:
    centre x and y, width, height and angle in degrees, counterclockwise.
    """
    if not len(found):
        return []
    if isinstance(found.pred_boxes, RotatedBoxes):
        rows = zip(
            found.pred_boxes.tensor.tolist(),
            found.scores.tolist(),
            found.pred_classes.tolist(),
            strict=True,
        )
        annotations = [
            {"image_id": image_id, "category_id": index, "bbox": box, "score": score}
            for box, score, index in rows
        ]
    else:
        annotations = instances_to_coco_json(found, image_id)
    for annotation in annotations:
        width, height = annotation["bbox"][2:4]
        mask = annotation.get("segmentation")
        annotation["area"] = float(mask_util.area(mask)) if mask else width * height
        if "keypoints" in annotation:
            annotation["num_keypoints"] = len(annotation["keypoints"]) // 3
    return annotations


def segment_annotations(
    segments: dict[int, np.ndarray], image_id: int, first: int
) -> list[dict[str, Any]]:
    """Return one COCO annotation, with a mask, for each class in a semantic segmentation.

    Args:
        segments: The mask (H, W) of each class; see :func:`segments`.
        image_id: The image id.
        first: The ``category_id`` of class 0. The ids of the other classes are ``first`` plus the
            class index.
    """
    annotations = []
    for index, segment in segments.items():
        mask = mask_util.encode(np.asfortranarray(segment, dtype=np.uint8))
        annotations.append(
            {
                "image_id": image_id,
                "category_id": first + index,
                "bbox": mask_util.toBbox(mask).tolist(),
                "area": float(mask_util.area(mask)),
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
            }
        )
    return annotations


def segments(output: dict[str, Any]) -> dict[int, np.ndarray]:
    """Return a dict from class indices to masks ``(H, W)`` for an image's semantic segmentation.

    For a panoptic segmentation, only the stuff segments are returned, not the objects.
    """
    if "panoptic_seg" in output:
        ids, info = output["panoptic_seg"]
        stuff = [segment for segment in info if not segment["isthing"]]
        ids = ids.cpu().numpy()
        return {segment["category_id"]: ids == segment["id"] for segment in stuff}
    if "sem_seg" in output:
        classes = output["sem_seg"].argmax(dim=0).cpu().numpy()
        return {index: classes == index for index in np.unique(classes).tolist()}
    return {}
