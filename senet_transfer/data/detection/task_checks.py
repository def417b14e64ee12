"""Validation of datasets for semantic segmentation or keypoint detection before a run starts."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from senet_transfer.data.detection.coco import CocoDataset, registered_entry
from senet_transfer.errors import UserError

_SHOWN = 3
# COCO defines these constants for the 17 keypoints of a person.
_COCO_KEYPOINTS = 17
_DEFAULT_IGNORED = 255


def stuff_classes(names: Sequence[str]) -> tuple[list[str], int]:
    """Return the classes and the ignored label of datasets for semantic segmentation.

    Args:
        names: The names of registered datasets, at least one.

    Raises:
        UserError: If a dataset has no classes or no label images, if label images are missing, or
            if two datasets have different classes or ignored labels.
    """
    found = {name: _stuff(name) for name in names}
    first, expected = next(iter(found.items()))
    for name, other in found.items():
        if other != expected:
            raise UserError(
                f"The datasets {first} and {name} have different semantic segmentation classes or "
                f"ignored labels: {expected} and {other}. All datasets of a run must have the "
                "same classes and ignored label."
            )
    return expected


def _stuff(name: str) -> tuple[list[str], int]:
    records = DatasetCatalog.get(name)
    # Loading the dataset may have set its metadata.
    metadata = MetadataCatalog.get(name)
    if not metadata.get("stuff_classes"):
        raise UserError(
            f"The dataset {name} has no semantic segmentation classes, which this "
            "MODEL.META_ARCHITECTURE requires; expected `stuff_classes` in its metadata. Set them "
            "in the code that registers the dataset: "
            f"MetadataCatalog.get({name!r}).set(stuff_classes=[...], ignore_label=255)."
        )
    paths = [record.get("sem_seg_file_name") for record in records]
    lacking = [str(path) for path in paths if not path or not os.path.isfile(path)]
    if lacking or not records:
        raise UserError(
            f"{len(lacking)} of {len(records)} images of the dataset {name} have no label image "
            f"({', '.join(lacking[:_SHOWN]) or 'the dataset is empty'}); expected the path of an "
            "existing single-channel image in `sem_seg_file_name` of every dataset dict. Correct "
            "the dataset dicts."
        )
    return list(metadata.stuff_classes), metadata.get("ignore_label", _DEFAULT_IGNORED)


def use_keypoints(cfg: CfgNode, names: Sequence[str]) -> None:
    """Check that datasets have the same keypoints, and copy their number and names to the config.

    Args:
        cfg: The config of a run with ``MODEL.KEYPOINT_ON``, modified in place.
        names: The names of registered datasets, at least one.

    Raises:
        UserError: If a dataset has no keypoints, if two datasets have different keypoints, or if
            ``TEST.KEYPOINT_OKS_SIGMAS`` does not match the keypoints.
    """
    found = {name: _keypoints(name) for name in names}
    first, keypoints = next(iter(found.items()))
    for name, other in found.items():
        if other != keypoints:
            raise UserError(
                f"The datasets {first} and {name} have different keypoints: {keypoints} and "
                f"{other}. All datasets of a run must have the same keypoints in the same order."
            )
    for name in cfg.DATASETS.TEST:
        dataset = registered_entry(name)
        summary = dataset.summary if isinstance(dataset, CocoDataset) else None
        if summary is not None and summary.num_without_keypoints:
            raise UserError(
                f"The dataset {name}: {summary.num_without_keypoints} of "
                f"{summary.num_annotations} annotations have no `keypoints` or `num_keypoints`, "
                "which the COCO metrics for keypoints require. For an object without visible "
                "keypoints, set `keypoints` to three zeros per keypoint and `num_keypoints` to 0."
            )
    cfg.DATASETS.KEYPOINTS = keypoints
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(keypoints)
    sigmas, count = list(cfg.TEST.KEYPOINT_OKS_SIGMAS), len(keypoints)
    expected = (0, count) if count == _COCO_KEYPOINTS else (count,)
    if cfg.DATASETS.TEST and len(sigmas) not in expected:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} values, but the data has {count} "
            f"keypoints ({', '.join(keypoints)}); expected one value per keypoint. A sigma is the "
            "typical deviation between annotators, relative to the object's size. COCO's values "
            "range from 0.025 (eyes) to 0.107 (hips). To use the same value for all keypoints, set "
            f"TEST.KEYPOINT_OKS_SIGMAS to {[0.05] * count}."
        )


def _keypoints(name: str) -> list[str]:
    metadata = MetadataCatalog.get(name)
    if not metadata.get("keypoint_names"):
        raise UserError(
            f"The dataset {name} has no keypoint names, which MODEL.KEYPOINT_ON requires; "
            "expected `keypoints` in the categories of its annotation file, as in COCO's person "
            "keypoints, or `keypoint_names` in its metadata. Add them, or set MODEL.KEYPOINT_ON "
            "to False."
        )
    return list(metadata.keypoint_names)
