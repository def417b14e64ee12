"""Error types of detectors, and the AP lost to each type.

The definitions are those of Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors" (ECCV 2020), and the results equal those of the authors' code. Each error has one of six
types:

- classification: IoU of 0.5 or more with an object of another class;
- localisation: IoU between 0.1 and 0.5 with an object of the same class;
- both: IoU between 0.1 and 0.5, only with objects of other classes;
- duplicate: IoU of 0.5 or more with an object of the same class that has a better detection;
- background: IoU of at most 0.1 with all objects;
- missed: an object without a true positive, classification error or localisation error.

The cost of an error type is the increase in AP, at an IoU of 0.5, if only errors of this type are
corrected. For each object without a true positive, only the classification or localisation error
with the highest score can be turned into a true positive. Classification errors are corrected by
turning these detections into true positives and removing all other classification errors, and
localisation errors in the same way. All other types of errors are corrected by removing the
detections or the missed objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from senet_transfer.evaluation.matching import (
    LEAST_OVERLAP,
    Bools,
    Floats,
    Ints,
    Overlaps,
    class_slices,
    greedy_matches,
    precision_at_recalls,
    rank_in_group,
)

ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)

IOU = 0.5
# The recalls of the authors' code, which differ from those of pycocotools in the last bit.
_RECALLS = np.arange(101) / 100


@dataclass(frozen=True)
class Errors:
    """Errors of a detector.

    Attributes:
        kind: Index of each detection's error type in :data:`ERROR_TYPES`, ``(D,)``. The index is
            -1 for true positives and for detections that are not considered. Detections in a crowd
            have an error type, but don't count as false positives.
        target: Index of the ground-truth object with the highest IoU, ``(D,)``. For localisation
            errors, only objects of the same class are considered, and for classification errors,
            only objects of other classes. For all other detections, the index is -1.
        corrected: True for the detections that become true positives when their error is corrected,
            ``(D,)``.
        hit: True for true positives, ``(D,)``.
        ignored: True for detections in a crowd, ``(D,)``.
        considered: True for the highest-scoring detections of each image, up to ``max_detections``,
            ``(D,)``.
        missed: True for missed ground-truth objects, ``(G,)``.
        unmatched: True for ground-truth objects without a true positive, ``(G,)``.
    """

    kind: Ints
    target: Ints
    corrected: Bools
    hit: Bools
    ignored: Bools
    considered: Bools
    missed: Bools
    unmatched: Bools


@dataclass(frozen=True)
class ErrorCosts:
    """AP lost to errors, in percent.

    Attributes:
        ap: AP at an IoU of 0.5. Unlike in the COCO metrics, the AP of classes that are detected but
            have no objects is 0.
        costs: AP gained by correcting all errors of a type, keyed by error type.
        counts: Number of errors, keyed by error type.
        false_positives: AP gained by removing all false positives.
        false_negatives: AP gained by removing all objects without a true positive.
    """

    ap: float
    costs: dict[str, float]
    counts: dict[str, int]
    false_positives: float
    false_negatives: float


def classify_errors(overlaps: Overlaps, *, max_detections: int = 100) -> Errors:
    """Determine the error type of each false positive, and find missed ground-truth objects.

    Args:
        overlaps: The detections and objects, with the IoU of each overlapping pair.
        max_detections: The maximum number of detections per image to consider, for all classes
            together.
    """
    considered = rank_in_group(overlaps.image) < max_detections
    same = overlaps.same_class & considered[overlaps.detection]
    single = ~overlaps.crowd[overlaps.object] & considered[overlaps.detection]
    hit_of = greedy_matches(
        overlaps,
        np.flatnonzero(same & single),
        rank_in_group(overlaps.classes, overlaps.image),
        np.array([IOU]),
        ignored=overlaps.crowd,
        first_of_equal=True,
    )[0]
    hit = hit_of >= 0
    used = np.zeros(len(overlaps.crowd), bool)
    used[hit_of[hit]] = True
    in_crowd = same & ~single & (overlaps.iou > IOU)
    ignored = ~hit & _any(overlaps, in_crowd)

    own, own_iou = _best(overlaps, same & single)
    other, other_iou = _best(overlaps, ~same & single)
    with_objects = np.zeros(overlaps.images, bool)
    with_objects[overlaps.object_image[~overlaps.crowd]] = True
    # The first condition that is true determines the type.
    conditions = {
        _BACKGROUND: ~with_objects[overlaps.image],
        _LOCALISATION: (own_iou >= LEAST_OVERLAP) & (own_iou <= IOU),
        _CLASSIFICATION: other_iou >= IOU,
        _DUPLICATE: _any(overlaps, same & single & used[overlaps.object] & (overlaps.iou >= IOU)),
        _BOTH: np.maximum(own_iou, other_iou) > LEAST_OVERLAP,
    }
    kind = np.select(list(conditions.values()), list(conditions), _BACKGROUND)
    kind[hit | ~considered] = -1
    target = np.select([kind == _LOCALISATION, kind == _CLASSIFICATION], [own, other], -1)
    # For each object, only the detection with the highest score can be corrected.
    candidates = np.flatnonzero(target >= 0)
    candidates = candidates[~used[target[candidates]]]
    corrected = np.zeros(len(kind), bool)
    corrected[candidates[np.unique(target[candidates], return_index=True)[1]]] = True
    unmatched = ~overlaps.crowd & ~used
    missed = unmatched.copy()
    missed[target[candidates]] = False
    return Errors(kind, target, corrected, hit, ignored, considered, missed, unmatched)


def _any(overlaps: Overlaps, pairs: Bools) -> Bools:
    """Return a mask ``(D,)`` of the detections that occur in at least one of the selected pairs."""
    found = np.zeros(len(overlaps.scores), bool)
    found[overlaps.detection[pairs]] = True
    return found


def _best(overlaps: Overlaps, pairs: Bools) -> tuple[Ints, Floats]:
    """Return the index of the object with the highest IoU for each detection, and this IoU.

    Only the selected detection-object pairs are considered. For detections without a selected pair,
    the index is -1 and the IoU is 0.
    """
    rows = np.flatnonzero(pairs)
    detection, target, iou = overlaps.detection[rows], overlaps.object[rows], overlaps.iou[rows]
    order = np.lexsort((target, -iou, detection))
    detection, first = np.unique(detection[order], return_index=True)
    best = np.full(len(overlaps.scores), -1)
    value = np.zeros(len(overlaps.scores))
    best[detection], value[detection] = target[order][first], iou[order][first]
    return best, value


@dataclass(frozen=True)
class _Points:
    """True and false positives with scores, from which an AP is computed."""

    classes: Ints
    scores: Floats
    hit: Bools
    kept: Bools
    order: Ints  # order of detections with equal scores
    objects: Ints

    def class_aps(self) -> Iterator[float]:
        """Yield the AP of each class that has objects or detections, in percent."""
        rows = np.flatnonzero(self.kept)
        rows = rows[np.lexsort((self.order[rows], -self.scores[rows], self.classes[rows]))]
        parts = class_slices(self.classes[rows], len(self.objects))
        for count, part in zip(self.objects.tolist(), parts, strict=True):
            hit = self.hit[rows[part]]
            if count:
                yield 100 * float(precision_at_recalls(hit, count, _RECALLS, least=0).mean())
            elif len(hit):
                yield 0.0

    def ap(self) -> float:
        """Return the AP averaged over classes, in percent; NaN if there are no class APs."""
        aps = list(self.class_aps())
        return sum(aps) / len(aps) if aps else float("nan")


def error_costs(overlaps: Overlaps, errors: Errors, classes: int) -> ErrorCosts:
    """Compute the AP that is lost to each type of error.

    Args:
        overlaps: The detections and objects, with the IoU of each overlapping pair.
        errors: The errors, as returned by :func:`classify_errors`.
        classes: The number of classes.
    """

    def per_class(objects: Bools) -> Ints:
        return np.bincount(overlaps.object_classes[objects], minlength=classes)

    position = np.arange(len(overlaps.scores))
    base = _Points(
        classes=overlaps.classes,
        scores=overlaps.scores,
        hit=errors.hit,
        kept=errors.considered & ~errors.ignored,
        order=position,
        objects=per_class(~overlaps.crowd),
    )
    ap = base.ap()
    # When it corrects errors, the authors' code sorts false positives first among equal scores.
    sorted_last = replace(base, order=position + len(position) * errors.hit)
    costs = {}
    for number, name in enumerate(ERROR_TYPES):
        wrong = errors.kind == number
        hit, labels = errors.hit, overlaps.classes
        if number in (_CLASSIFICATION, _LOCALISATION):
            hit = hit | (wrong & errors.corrected)
            labels = labels.copy()
            labels[wrong] = overlaps.object_classes[errors.target[wrong]]
        corrected = replace(
            sorted_last,
            classes=labels,
            hit=hit,
            kept=np.where(wrong, errors.corrected, base.kept),
            objects=base.objects - (per_class(errors.missed) if name == "missed" else 0),
        )
        costs[name] = max(corrected.ap() - ap, 0)
    precise = replace(sorted_last, scores=errors.hit.astype(float))
    complete = replace(sorted_last, objects=base.objects - per_class(errors.unmatched))
    counts = np.bincount(errors.kind[errors.kind >= 0], minlength=len(ERROR_TYPES))
    return ErrorCosts(
        ap=ap,
        costs=costs,
        counts=dict(zip(ERROR_TYPES, counts.tolist(), strict=True))
        | {"missed": int(errors.missed.sum())},
        false_positives=precise.ap() - ap,
        false_negatives=complete.ap() - ap,
    )
