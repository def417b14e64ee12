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
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress

# Detections below this score are not shown.
LEAST_SCORE = 0.1
# Score and IoU thresholds of the F1 by which images are selected for the gallery.
SCORE, OVERLAP = 0.5, 0.5
SIDE = 320


@dataclass
class Found:
    """Detections in an image, sorted by decreasing score.

    Attributes:
        boxes: Boxes as left, top, width and height in pixels, ``(N, 4)``.
        scores: Scores in [0, 1], ``(N,)``.
        classes: Class indices, ``(N,)``.
        matches: Index of the object matched by each detection, or -1, ``(N,)``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    matches: np.ndarray


def detection_galleries(
    runs: list[Run], budget: int, say: Callable[[str], None], *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Build a gallery for each data set that has saved detections.

    Args:
        runs: The runs to report.
        budget: The largest number of images in all galleries together.
        say: Called with a message if something can't be shown.
        quiet: Show no progress bar.

    Returns:
        A dict per data set with ``data`` (its name), ``classes``, ``total`` (number of images),
        ``runs`` (indices) and ``images``. Each image has ``name``, ``src`` (a data URI), ``width``,
        ``height``, ``truth`` (left, top, width, height, class) and ``found`` (by run: the same
        values, score in percent, match).
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
    return run.folder / "inference" / name / "coco_instances_results.json"


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
            np.mean([_f1(image, found[position][place]) for position in read] or [0])
            for place, image in enumerate(images)
        ]
    )
    chosen = _worst_and_best(quality, budget)
    most = 50 if len(read) <= 4 else 20
    entries = []
    for place in progress(chosen, desc=f"pictures of {name}", unit="image", quiet=quiet):
        entry = _picture(images[place])
        if isinstance(entry, str):
            say(entry)
            continue
        for position in read:
            entry["found"][position] = _shown(found[position][place], entry["scale"], most)
        del entry["scale"]
        entries.append(entry)
    classes = list(metadata.thing_classes)
    return {
        "data": name, "classes": classes, "total": len(images), "runs": read, "images": entries
    }  # fmt: skip


def _ground_truth(run: Run, name: str) -> tuple[list[dict], Any]:
    register_datasets(run.cfg.DATASETS.get("REGISTER", []))
    if name not in DatasetCatalog:
        raise UserError(f"the data set {name} isn't registered. Register it as for training.")
    try:
        images = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(f"its annotations can't be read ({error}).") from error
    for image in images:
        # Sort crowds last. The page leaves them out, and the indices of other objects stay valid.
        objects = sorted(image.get("annotations", []), key=lambda o: o.get("iscrowd", 0))
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYWH_ABS) for o in objects]
        image["boxes"] = np.array(boxes, np.float64).reshape(-1, 4)
        image["classes"] = np.array([o["category_id"] for o in objects], np.int64)
        image["crowd"] = np.array([o.get("iscrowd", 0) for o in objects], np.uint8)
    return images, MetadataCatalog.get(name)


def _read_found(path: Path, images: list[dict], metadata: Any) -> list[Found]:
    """Read the detections of each image, in the order of the images."""
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
                f"{path} has a detection in image {row['image_id']} of category "
                f"{row['category_id']}, which the data set no longer contains. Repeat the "
                "evaluation."
            )
        by_image[row["image_id"]].append(row)
    result = []
    for image in images:
        mine = sorted(by_image[image["image_id"]], key=lambda row: -row["score"])
        boxes = np.array([row["bbox"] for row in mine], np.float64).reshape(-1, 4)
        classes = np.array([to_class[row["category_id"]] for row in mine], np.int64)
        matches = match_detections(boxes, classes, image)
        keep = matches > -2
        scores = np.array([row["score"] for row in mine], np.float64)
        result.append(Found(boxes[keep], scores[keep], classes[keep], matches[keep]))
    return result


def match_detections(boxes: np.ndarray, classes: np.ndarray, image: dict[str, Any]) -> np.ndarray:
    """Match detections with objects by COCO's rule at an IoU of 0.5.

    In the order of their scores, detections are matched with the free object of their class that
    has the highest IoU. Unmatched detections that lie on a crowd are ignored. Dropping detections
    with low scores doesn't change the matches of the others.

    Args:
        boxes: Boxes as left, top, width and height, sorted by decreasing score, ``(N, 4)``.
        classes: Class indices, ``(N,)``.
        image: A dict with the objects' ``boxes`` ``(M, 4)``, ``classes`` ``(M,)`` and ``crowd``
            ``(M,)``, 0 or 1.

    Returns:
        The index of the matched object, -1 for no match, or -2 for a crowd, ``(N,)``.
    """
    matches = np.full(len(boxes), -1)
    if not len(boxes) or not len(image["boxes"]):
        return matches
    overlaps = np.asarray(coco_mask.iou(boxes, image["boxes"], image["crowd"]))
    overlaps[classes[:, None] != image["classes"]] = 0
    single = image["crowd"] == 0
    free = single.copy()
    for place, overlap in enumerate(overlaps):
        best = int(np.argmax(np.where(free, overlap, -1)))
        if free[best] and overlap[best] >= OVERLAP:
            matches[place], free[best] = best, False
        elif (overlap[~single] >= OVERLAP).any():
            matches[place] = -2
    return matches


def _f1(image: dict[str, Any], found: Found) -> float:
    """Return the F1 score of an image's detections, or 1 without objects and detections."""
    shown = found.scores >= SCORE
    hits = int((found.matches[shown] >= 0).sum())
    both = int((image["crowd"] == 0).sum()) + int(shown.sum())
    return 2 * hits / both if both else 1.0


def _worst_and_best(quality: np.ndarray, budget: int) -> list[int]:
    """Return the indices of all images, or of equally many worst and best if over the budget."""
    order = np.argsort(quality, kind="stable")
    if len(order) > budget:
        half = budget - budget // 2
        order = np.concatenate([order[:half], order[len(order) - (budget - half) :]])
    return order.tolist()


def _picture(image: dict[str, Any]) -> dict[str, Any] | str:
    name = image["file_name"].rpartition("/")[2]
    try:
        pixels = read_image(image["file_name"], "RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise various exceptions for damaged files
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
         int(found.matches[k])]
        for k in range(min(len(found.scores), most))
    ]  # fmt: skip


def _rounded(box: np.ndarray) -> list[float]:
    return np.round(box, 1).tolist()
