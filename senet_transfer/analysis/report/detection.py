"""The gallery of a detector's validation images: what is there beside what was found."""

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
# The score and overlap at which an image is judged when the pictures are chosen.
SCORE, OVERLAP = 0.5, 0.5
SIDE = 320


@dataclass
class Found:
    """The detections of an image, best first.

    Attributes:
        boxes: ``(N, 4)`` left, top, width, height in pixels.
        scores: ``(N,)`` 0-1.
        classes: ``(N,)`` positions in the list of classes.
        matches: ``(N,)`` the object that each one hits, -1 for none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    matches: np.ndarray


def detection_galleries(
    runs: list[Run], budget: int, say: Callable[[str], None], *, quiet: bool = False
) -> list[dict[str, Any]]:
    """A gallery for each data set that detections are there for.

    Args:
        runs: of the page.
        budget: pictures in all galleries together.
        say: called with a sentence where something can't be shown.
        quiet: no progress bar.

    Returns:
        For each data set its ``data`` (name), ``classes``, ``total`` images, ``runs`` (positions)
        and ``images``: ``name``, ``src``, ``width`` and ``height`` of the picture, ``truth`` (left,
        top, width, height, class) and ``found``, by run (the same, score in percent, match).
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
            say(f"No pictures of {name}: {error}")
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
        raise UserError(f"nothing is registered as {name}. Register it, as for training.")
    try:
        images = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(f"its annotations can't be read ({error}).") from error
    for image in images:
        # Crowds last, so that the positions of the others are those on the page.
        objects = sorted(image.get("annotations", []), key=lambda o: o.get("iscrowd", 0))
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYWH_ABS) for o in objects]
        image["boxes"] = np.array(boxes, np.float64).reshape(-1, 4)
        image["classes"] = np.array([o["category_id"] for o in objects], np.int64)
        image["crowd"] = np.array([o.get("iscrowd", 0) for o in objects], np.uint8)
    return images, MetadataCatalog.get(name)


def _read_found(path: Path, images: list[dict], metadata: Any) -> list[Found]:
    """The detections of each image, in the order of the images."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}. Evaluate again.") from error
    to_class = metadata.get("thing_dataset_id_to_contiguous_id") or {
        number: number for number in range(len(metadata.thing_classes))
    }
    by_image: dict[Any, list[dict]] = {image["image_id"]: [] for image in images}
    for row in rows:
        if row["score"] < LEAST_SCORE:
            continue
        if row["image_id"] not in by_image or row["category_id"] not in to_class:
            raise UserError(
                f"{path} has detections of image {row['image_id']}, class {row['category_id']}, "
                "which the data set now lacks. Evaluate again."
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
    """Match each detection with an object by COCO's rule at an overlap of one half.

    The best detection takes the object of its class that it overlaps most. What is left, and lies
    on a crowd, counts for nothing. The best come first, so leaving out low scores changes no match.

    Args:
        boxes: ``(N, 4)`` left, top, width, height, best first.
        classes: ``(N,)``.
        image: its ``boxes`` ``(M, 4)``, ``classes`` and ``crowd`` ``(M,)``, 0 or 1.

    Returns:
        ``(N,)`` the object's position, -1 for none, -2 for a crowd.
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
    """Twice the hits over objects and detections together; 1 where there is neither."""
    shown = found.scores >= SCORE
    hits = int((found.matches[shown] >= 0).sum())
    both = int((image["crowd"] == 0).sum()) + int(shown.sum())
    return 2 * hits / both if both else 1.0


def _worst_and_best(quality: np.ndarray, budget: int) -> list[int]:
    """The positions of as many worst as best images; all where there is room."""
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
    except Exception as error:  # decoders raise whatever the damage makes them stumble over
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
