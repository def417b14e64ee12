"""Galleries of validation images with ground-truth objects and detections."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as coco_mask

from senet_transfer.analysis.report.pictures import data_uri
from senet_transfer.analysis.report.run_folder import Run
from senet_transfer.data.detection.coco import register_datasets
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.channels import as_rgb
from senet_transfer.data.images.decode import Reading
from senet_transfer.data.reading import reading_of
from senet_transfer.errors import UserError
from senet_transfer.evaluation.error_types import ERROR_TYPES, classify_errors
from senet_transfer.evaluation.matching import ImageDetections, ImageObjects, find_overlaps
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import folder_name

# Detections with lower scores are not shown.
LEAST_SCORE = 0.1
# Score and IoU thresholds of the F1 score that is used to select images for the gallery.
SCORE, OVERLAP = 0.5, 0.5
# Size of the images on the page in pixels. Viewers can enlarge them.
SIDE = 640


@dataclass
class Found:
    """Detections in an image, sorted by decreasing score.

    Attributes:
        boxes: Boxes (left, top, width, height) in pixels, ``(N, 4)``.
        scores: Scores in [0, 1], ``(N,)``.
        classes: Class indices, ``(N,)``.
        matches: Index of the ground-truth object matched to each detection, or -1 for unmatched
            detections, ``(N,)``.
        errors: Index of each detection's error type in ``ERROR_TYPES``, or -1 for detections
            without an error, ``(N,)``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    matches: np.ndarray
    errors: np.ndarray


def detection_galleries(
    runs: list[Run], budget: int, say: Callable[[str], None], *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Build an image gallery for each dataset for which the runs contain saved detections.

    Args:
        runs: The runs to report on.
        budget: The maximum total number of images in all galleries.
        say: A function that is called with a message if an image can't be shown.
        quiet: If True, show no progress bar.

    Returns:
        One dict per dataset with ``data`` (its name), ``classes``, ``total`` (number of images),
        ``errors`` (names of the error types), ``runs`` (indices into the argument ``runs``) and
        ``images``.
        Each image is a dict with ``name``, ``src`` (a data URI), ``width``, ``height``, ``truth``
        (left, top, width, height and class of each ground-truth object) and ``found`` (a dict from
        run index to detections: left, top, width, height, class, score in percent, index of the
        matched object and index of the error type of each detection).
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for position, run in enumerate(runs):
        for name in run.cfg.DATASETS.TEST:
            if _results_file(run, name).is_file():
                registered = {entry[0]: entry[1] for entry in run.cfg.DATASETS.get("REGISTER", [])}
                groups.setdefault((name, registered.get(name, "")), []).append(position)
    galleries = []
    for (name, _), positions in groups.items():
        try:
            share = max(budget // len(groups), 1)
            galleries.append(_gallery(name, positions, runs, share, say, quiet))
        except UserError as error:
            say(f"The images of {name} can't be shown: {error}")
    return galleries


def _results_file(run: Run, name: str) -> Path:
    return run.folder / "inference" / folder_name(name) / "coco_instances_results.json"


def _gallery(
    name: str,
    positions: list[int],
    runs: list[Run],
    budget: int,
    say: Callable[[str], None],
    quiet: bool,
) -> dict[str, Any]:
    images, metadata = _ground_truth(runs[positions[0]], name)
    found, read = {}, []
    for position in positions:
        try:
            found[position] = _read_found(_results_file(runs[position], name), images, metadata)
            read.append(position)
        except UserError as error:
            say(f"{runs[position].name}: {error}")
    quality = np.array(
        [
            np.mean([_f1(image, found[position][index]) for position in read] or [0])
            for index, image in enumerate(images)
        ]
    )
    chosen = _worst_and_best(quality, budget)
    most = 50 if len(read) <= 4 else 20
    entries = []
    for index in progress(chosen, desc=f"pictures of {name}", unit="image", quiet=quiet):
        entry = _picture(images[index], reading_of(runs[positions[0]].cfg))
        if isinstance(entry, str):
            say(entry)
            continue
        for position in read:
            entry["found"][position] = _shown(found[position][index], entry["scale"], most)
        del entry["scale"]
        entries.append(entry)
    classes = list(metadata.thing_classes)
    return {
        "data": name, "classes": classes, "total": len(images), "runs": read, "images": entries,
        "errors": list(ERROR_TYPES),
    }  # fmt: skip


def _ground_truth(run: Run, name: str) -> tuple[list[dict], Any]:
    upright = reading_of(run.cfg).upright
    register_datasets(run.cfg.DATASETS.get("REGISTER", []), upright=upright)
    if name not in DatasetCatalog:
        raise UserError(
            f"the dataset {name} isn't registered. Register it in the same way as for training."
        )
    try:
        images = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(f"the annotations of {name} can't be read ({error}).") from error
    for image in images:
        # Sort crowds last: the page omits them, and the indices of other objects must stay valid.
        objects = sorted(image.get("annotations", []), key=lambda o: o.get("iscrowd", 0))
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYWH_ABS) for o in objects]
        image["boxes"] = np.array(boxes, np.float64).reshape(-1, 4)
        image["classes"] = np.array([o["category_id"] for o in objects], np.int64)
        image["crowd"] = np.array([o.get("iscrowd", 0) for o in objects], np.uint8)
    return images, MetadataCatalog.get(name)


def _read_found(path: Path, images: list[dict], metadata: Any) -> list[Found]:
    """Read a run's detections from a results file, and return them in the order of ``images``."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}. Repeat the evaluation.") from error
    to_class = metadata.get("thing_dataset_id_to_contiguous_id") or {
        number: number for number in range(len(metadata.thing_classes))
    }
    by_image: dict[Any, list[dict]] = {image["image_id"]: [] for image in images}
    for row in rows:
        if row["score"] < LEAST_SCORE:
            continue
        if row["image_id"] not in by_image or row["category_id"] not in to_class:
            raise UserError(
                f"{path} contains a detection with image id {row['image_id']} and category id "
                f"{row['category_id']}; expected ids that exist in the dataset. Repeat the "
                "evaluation."
            )
        by_image[row["image_id"]].append(row)
    detections = []
    for image in images:
        mine = sorted(by_image[image["image_id"]], key=lambda row: -row["score"])
        detections.append(
            ImageDetections(
                np.array([row["bbox"] for row in mine], np.float64).reshape(-1, 4),
                np.array([to_class[row["category_id"]] for row in mine], np.int64),
                np.array([row["score"] for row in mine], np.float64),
            )
        )
    result = []
    for image, found, errors in zip(images, detections, _errors(images, detections), strict=True):
        boxes = np.asarray(found.regions)
        matches = match_detections(boxes, found.classes, image)
        columns = boxes, found.scores, found.classes, matches, errors
        result.append(Found(*(column[matches > -2] for column in columns)))
    return result


def _errors(images: list[dict], detections: list[ImageDetections]) -> list[np.ndarray]:
    """Return the error types of the detections, as one array per image; see ``ERROR_TYPES``."""
    objects = [
        ImageObjects(image["boxes"], image["classes"], image["crowd"], image["boxes"][:, 2])
        for image in images
    ]
    kinds = classify_errors(find_overlaps(objects, detections)).kind
    return np.split(kinds, np.cumsum([len(found.scores) for found in detections])[:-1])


def match_detections(boxes: np.ndarray, classes: np.ndarray, image: dict[str, Any]) -> np.ndarray:
    """Match detections to ground-truth objects as in COCO evaluation at an IoU threshold of 0.5.

    In order of decreasing score, each detection is matched to the unmatched object of the same
    class that has the highest IoU. Detections that match only a crowd are ignored. Omitting
    detections with low scores doesn't change the matches of the remaining detections.

    Args:
        boxes: The boxes (left, top, width, height), sorted by decreasing score, ``(N, 4)``.
        classes: The class indices, ``(N,)``.
        image: A dict with the ground truth: ``boxes`` ``(M, 4)``, ``classes`` ``(M,)`` and
            ``crowd`` ``(M,)``, which is 0 or 1.

    Returns:
        The index of the object matched to each detection, -1 for unmatched detections, or -2 for
        detections matched to a crowd, ``(N,)``.
    """
    matches = np.full(len(boxes), -1)
    if not len(boxes) or not len(image["boxes"]):
        return matches
    overlaps = np.asarray(coco_mask.iou(boxes, image["boxes"], image["crowd"]))
    overlaps[classes[:, None] != image["classes"]] = 0
    single = image["crowd"] == 0
    free = single.copy()
    for index, overlap in enumerate(overlaps):
        best = int(np.argmax(np.where(free, overlap, -1)))
        if free[best] and overlap[best] >= OVERLAP:
            matches[index], free[best] = best, False
        elif (overlap[~single] >= OVERLAP).any():
            matches[index] = -2
    return matches


def _f1(image: dict[str, Any], found: Found) -> float:
    """Return the F1 score of an image, which is 1 if it has neither objects nor detections."""
    shown = found.scores >= SCORE
    hits = int((found.matches[shown] >= 0).sum())
    both = int((image["crowd"] == 0).sum()) + int(shown.sum())
    return 2 * hits / both if both else 1.0


def _worst_and_best(quality: np.ndarray, budget: int) -> list[int]:
    """Return the indices of the images to show, sorted by the quality of their detections.

    ``quality`` contains an F1 score per image. If there are more than ``budget`` images, the first
    half of the result contains the images with the lowest F1 scores, and the second half contains
    the images with the highest F1 scores.
    """
    order = np.argsort(quality, kind="stable")
    if len(order) > budget:
        half = budget - budget // 2
        order = np.concatenate([order[:half], order[len(order) - (budget - half) :]])
    return order.tolist()


def _picture(image: dict[str, Any], reading: Reading) -> dict[str, Any] | str:
    name = image["file_name"].rpartition("/")[2]
    try:
        pixels = as_rgb(read_image(image["file_name"], "RGB", reading))
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise various exceptions for corrupted files.
        return f"{name} can't be shown: {error}"
    source, (width, height) = data_uri(pixels, SIDE)
    scale = width / pixels.shape[1]
    truth = [
        [*_rounded(box * scale), int(number)]
        for box, number, crowd in zip(image["boxes"], image["classes"], image["crowd"], strict=True)
        if not crowd
    ]
    return {
        "name": name, "src": source, "width": width, "height": height,
        "scale": scale, "truth": truth, "found": {},
    }  # fmt: skip


def _shown(found: Found, scale: float, most: int) -> list[list[float]]:
    return [
        [*_rounded(found.boxes[k] * scale), int(found.classes[k]),
         round(float(100 * found.scores[k])),
         int(found.matches[k]), int(found.errors[k])]
        for k in range(min(len(found.scores), most))
    ]  # fmt: skip


def _rounded(box: np.ndarray) -> list[float]:
    return np.round(box, 1).tolist()
