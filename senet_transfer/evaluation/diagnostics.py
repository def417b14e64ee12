"""Diagnostics of object detectors: AP by object size and count, error types and confusions.

AP, precision and recall are computed as in the COCO metrics; see
:mod:`~senet_transfer.evaluation.matching`. The error types are those of TIDE; see
:mod:`~senet_transfer.evaluation.error_types`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from senet_transfer.evaluation.error_types import ErrorCosts, classify_errors, error_costs
from senet_transfer.evaluation.matching import (
    IOU_THRESHOLDS,
    Floats,
    ImageDetections,
    ImageObjects,
    Ints,
    Matches,
    Overlaps,
    class_slices,
    find_overlaps,
    greedy_matches,
    match_by_class,
    precisions,
    rank_in_group,
)

# COCO's object size ranges, as areas in square pixels.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
# Minimum number of objects per image in each group. A group ends where the next one starts.
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)

# Indices of IoU thresholds in IOU_THRESHOLDS.
_IOU50, _IOU75, _IOU90 = 0, 5, 8
_CURVES = {"0.5": _IOU50, "0.75": _IOU75, "0.9": _IOU90}
# Minimum number of objects of a size for a comparison in the summary.
_MANY = 20
# Number of decimal places of the precision in curves.
_DIGITS = 4


def diagnose(
    objects: Sequence[ImageObjects],
    detections: Sequence[ImageDetections],
    classes: Sequence[str],
    *,
    max_detections: int = 100,
) -> dict[str, Any]:
    """Compute the diagnostics of a detector from ground truth and detections.

    The AP is in percent; precision, recall, F1 and thresholds are in [0, 1]; undefined values are
    NaN. The result contains:

    - ``summary``: the main results in a few sentences;
    - ``images``, ``objects``, ``detections``: the number of images, ground-truth objects and
      detections;
    - ``AP``, ``AP50``, ``AP75``: the COCO metrics;
    - ``by_size``: the COCO metrics and the number of objects, for objects grouped by area;
    - ``by_count``: the COCO metrics and the numbers of images and objects, for images grouped by
      number of objects;
    - ``errors``: for each error type, the lost ``AP50`` and the ``count``. The entries
      ``false_positive`` and ``false_negative`` contain the ``AP50`` lost to all such errors;
    - ``error_AP50``: the AP50 on which these losses are based. It includes classes that are
      detected but have no objects;
    - ``best``: the score threshold with the highest F1 at an IoU of 0.5, and the ``precision``,
      ``recall`` and ``F1`` of the detections with at least this score;
    - ``classes``: for each class, the numbers of objects and detections, the AP, the values of
      ``best`` for this class, and the ``curve``;
    - ``curves``: for each IoU threshold, the interpolated precision at recalls of 0, 0.01, ...,
      1, averaged over classes. The ``curve`` of a class is for the threshold 0.5;
    - ``confusion``: the ``matrix``, which counts detections with a score of at least ``score`` by
      the class of the object (row) and of the detection (column). The last row counts unmatched
      detections, and the last column counts unmatched objects.

    Args:
        objects: The ground-truth objects in each image.
        detections: The detections in each image, in the same order.
        classes: The names of the classes.
        max_detections: The maximum number of detections per image: for each class in the COCO
            metrics, and for all classes together in the error types.

    Returns:
        A JSON-serialisable dict with the entries above.
    """
    overlaps = find_overlaps(objects, detections)
    count = len(classes)
    matches = match_by_class(overlaps, max_detections=max_detections)
    curves = precisions(overlaps, matches, count)
    costs = error_costs(overlaps, classify_errors(overlaps, max_detections=max_detections), count)
    best = _best_threshold(overlaps, matches, matches.considered)
    score = best["threshold"]
    found: dict[str, Any] = {
        "summary": "",
        "images": overlaps.images,
        "objects": int((~overlaps.crowd).sum()),
        "detections": len(matches.considered),
        **_aps(curves),
        "by_size": _by_size(overlaps, count, max_detections),
        "by_count": _by_count(overlaps, matches, count),
        "errors": _errors(costs),
        "error_AP50": costs.ap,
        "best": best,
        "classes": _by_class(overlaps, matches, curves, classes),
        "curves": {name: _curve(curves[:, row]) for name, row in _CURVES.items()},
        "confusion": {
            "score": score,
            "matrix": _confusion(overlaps, matches, count, score).tolist(),
        },
    }
    found["summary"] = summary(found)
    return found


def _mean(values: Floats) -> float:
    """Return the mean of the finite values, or NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _aps(curves: Floats) -> dict[str, float]:
    """Compute AP, AP50 and AP75, in percent, from the precision ``(C, T, 101)``.

    The dimensions are class, IoU threshold and recall.
    """
    one = {"AP50": curves[:, _IOU50], "AP75": curves[:, _IOU75]}
    return {name: 100 * _mean(values) for name, values in ({"AP": curves} | one).items()}


def _curve(curves: Floats) -> list[float]:
    """Return the mean ``(101,)`` of the classes' precision-recall curves ``(C, 101)``.

    Classes without objects are ignored. If no class has objects, return an empty list.
    """
    known = curves[np.isfinite(curves[:, 0])]
    return np.round(known.mean(0), _DIGITS).tolist() if len(known) else []


def _by_size(overlaps: Overlaps, classes: int, max_detections: int) -> list[dict[str, Any]]:
    rows = []
    for name, area in SIZES.items():
        matches = match_by_class(overlaps, area=area, max_detections=max_detections)
        rows.append({
            "size": name, "area": [area[0], area[1] if math.isfinite(area[1]) else None],
            "objects": int(matches.counted.sum()), **_aps(precisions(overlaps, matches, classes)),
        })  # fmt: skip
    return rows


def _by_count(overlaps: Overlaps, matches: Matches, classes: int) -> list[dict[str, Any]]:
    per_image = np.bincount(overlaps.object_image[~overlaps.crowd], minlength=overlaps.images)
    rows = []
    for least, after in zip(COUNTS, [*COUNTS[1:], None], strict=True):
        images = per_image >= least
        if after is not None:
            images &= per_image < after
        if images.any():
            rows.append({
                "from": least, "to": None if after is None else after - 1,
                "images": int(images.sum()), "objects": int(per_image[images].sum()),
                **_aps(precisions(overlaps, matches, classes, images)),
            })  # fmt: skip
    return rows


def _errors(costs: ErrorCosts) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {
        name: {"AP50": cost, "count": costs.counts[name]} for name, cost in costs.costs.items()
    }
    found["false_positive"] = {"AP50": costs.false_positives}
    found["false_negative"] = {"AP50": costs.false_negatives}
    return found


def _best_threshold(
    overlaps: Overlaps, matches: Matches, rows: Ints, label: int | None = None
) -> dict[str, float]:
    """Return the score threshold with the highest F1, with the resulting precision, recall and F1.

    Args:
        overlaps: The detections and objects, with the IoU of each overlapping pair.
        matches: The matches of these detections and objects.
        rows: The indices of the detections to consider.
        label: The class whose objects are counted. If None, all objects are counted.
    """
    objects = ~overlaps.crowd
    if label is not None:
        objects = objects & (overlaps.object_classes == label)
    total = int(objects.sum())
    rows = rows[~matches.ignored[_IOU50, rows]]
    rows = rows[np.argsort(-overlaps.scores[rows], kind="stable")]
    nothing = {
        "threshold": math.nan,
        "precision": math.nan,
        "recall": 0.0 if total else math.nan,
        "F1": 0.0 if total else math.nan,
    }
    if not total or not len(rows):
        return nothing
    scores, true = overlaps.scores[rows], np.cumsum(matches.hit[_IOU50, rows])
    if not true[-1]:
        return {**nothing, "precision": 0.0}
    # A threshold can't separate detections with equal scores.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    f1 = 2 * true[last] / (last + 1 + total)
    best = int(last[np.argmax(f1)])
    return {
        "threshold": float(scores[best]),
        "precision": float(true[best] / (best + 1)),
        "recall": float(true[best] / total),
        "F1": float(f1.max()),
    }


def _by_class(
    overlaps: Overlaps, matches: Matches, curves: Floats, classes: Sequence[str]
) -> list[dict[str, Any]]:
    objects = np.bincount(overlaps.object_classes[~overlaps.crowd], minlength=len(classes))
    parts = class_slices(overlaps.classes[matches.considered], len(classes))
    found = []
    for label, (name, part) in enumerate(zip(classes, parts, strict=True)):
        rows = matches.considered[part]
        found.append({
            "name": name, "objects": int(objects[label]), "detections": len(rows),
            **_aps(curves[label : label + 1]),
            **_best_threshold(overlaps, matches, rows, label),
            "curve": _curve(curves[label : label + 1, _IOU50]),
        })  # fmt: skip
    return found


def _confusion(overlaps: Overlaps, matches: Matches, classes: int, score: float) -> Ints:
    """Return the confusion matrix at an IoU of 0.5, ``(C + 1, C + 1)``.

    True positives are determined as in the COCO metrics. In order of decreasing score, each of the
    remaining detections is matched to the unmatched object of a different class with the highest
    IoU. Detections in a crowd are not counted.
    """
    kept = np.zeros(len(overlaps.scores), bool)
    kept[matches.considered] = True
    kept &= ~matches.ignored[_IOU50] & ~(overlaps.scores < score)
    hit = kept & matches.hit[_IOU50]
    taken = np.zeros(len(overlaps.crowd), bool)
    taken[matches.match[_IOU50, hit]] = True
    available = (kept & ~hit)[overlaps.detection] & ~(taken | overlaps.crowd)[overlaps.object]
    other = greedy_matches(
        overlaps,
        np.flatnonzero(available & ~overlaps.same_class),
        rank_in_group(overlaps.image),
        IOU_THRESHOLDS[:1],
        ignored=overlaps.crowd,
    )[0]
    other[hit] = matches.match[_IOU50, hit]
    # Detections without an object have the index -1, which selects the background.
    labels = np.append(overlaps.object_classes, classes)
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(matrix, (labels[other[kept]], overlaps.classes[kept]), 1)
    alone = ~overlaps.crowd
    alone[other[kept & (other >= 0)]] = False
    matrix[:classes, classes] = np.bincount(overlaps.object_classes[alone], minlength=classes)
    return matrix


def summary(found: dict[str, Any]) -> str:
    """Return the main results of :func:`diagnose` in a few sentences."""
    if not found["objects"]:
        return "The dataset contains no objects."
    if not found["detections"]:
        return f"None of the {found['objects']:,} objects is detected: there are no detections."
    sentences = [_main_loss(found), _confused(found), _worst_size(found)]
    return " ".join(filter(None, sentences))


def _main_loss(found: dict[str, Any]) -> str:
    """Return a sentence about the main cause of lost AP.

    The AP lost to each type of error is compared at an IoU of 0.5. AP that is only lost at higher
    IoU thresholds counts as lost to localisation errors.
    """
    ap, ap50, ap75 = (found[name] for name in ("AP", "AP50", "AP75"))
    both = f"AP50 {ap50:.1f}, AP75 {ap75:.1f}"
    costs = {name: found["errors"][name]["AP50"] for name in _SENTENCES}
    # The loss is undefined if no classes remain after correcting the errors.
    losses = {name: cost if math.isfinite(cost) else 0.0 for name, cost in costs.items()}
    losses["localisation"] += max(ap50 - ap, 0)
    worst = max(losses, key=lambda name: losses[name])
    if losses[worst] < 1:
        return f"There is little to gain: AP {ap:.1f}, {both}."
    share = "Most" if losses[worst] > sum(losses.values()) / 2 else "The largest part"
    reason = both if worst == "localisation" else f"they cost {costs[worst]:.1f} AP50 ({both})"
    return f"{share} of the lost AP is due to {_SENTENCES[worst]}: {reason}."


_SENTENCES = {
    "classification": "classification errors",
    "localisation": "localisation errors",
    "both": "detections with the wrong class and poor localisation",
    "duplicate": "repeated detections of the same object",
    "background": "detections of background",
    "missed": "missed objects",
}


def _confused(found: dict[str, Any]) -> str:
    """Return a sentence about the most confused classes, or "" if there are few confusions."""
    matrix = np.array(found["confusion"]["matrix"])[:-1, :-1]
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    if wrong.size == 0 or wrong.max() < 2:
        return ""
    row, column = np.unravel_index(wrong.argmax(), wrong.shape)
    names = [one["name"] for one in found["classes"]]
    objects = found["classes"][row]["objects"]
    return (
        f"The most confused classes: {wrong[row, column]} of {objects:,} objects of the class "
        f"{names[row]} are detected as {names[column]}."
    )


def _worst_size(found: dict[str, Any]) -> str:
    """Return a sentence about the object size with the lowest AP, or "" if all APs are similar."""
    # The AP of only a few objects is not meaningful.
    known = [row for row in found["by_size"] if row["objects"] >= _MANY]
    known.sort(key=lambda row: row["AP"])
    if len(known) < 2 or known[0]["AP"] > 0.75 * known[-1]["AP"]:
        return ""
    worst, best = known[0], known[-1]
    return (
        f"The AP of {worst['size']} objects is {worst['AP']:.1f}, while that of {best['size']} "
        f"objects is {best['AP']:.1f}."
    )
