"""Matching of detections to ground-truth objects, and average precision.

The arrays contain the detections or objects of all images. The definitions are those of the COCO
metrics, and the results equal those of pycocotools.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

# Pairs of a detection and an object with a lower IoU are irrelevant for all metrics and error
# types.
LEAST_OVERLAP = 0.1
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# pycocotools' recall thresholds. Some differ from multiples of 0.01 in the last bit.
RECALLS = np.linspace(0, 1, 101)

Regions = NDArray | Sequence[dict]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ImageObjects:
    """Ground-truth objects in an image.

    Attributes:
        regions: Boxes (left, top, width, height) in pixels, ``(N, 4)``, or masks in compressed
            COCO run-length encoding (RLE).
        classes: Class indices, ``(N,)``.
        crowd: True for crowds (regions with many objects), in which detections are ignored,
            ``(N,)``.
        areas: Areas in square pixels, ``(N,)``, which determine whether an object is small, medium
            or large.
    """

    regions: Regions
    classes: NDArray
    crowd: NDArray
    areas: NDArray


@dataclass(frozen=True)
class ImageDetections:
    """Detections in an image, in any order.

    Attributes:
        regions: Boxes or masks, in the same format as in :class:`ImageObjects`.
        classes: Class indices, ``(N,)``.
        scores: Scores, ``(N,)``.
    """

    regions: Regions
    classes: NDArray
    scores: NDArray


@dataclass(frozen=True)
class Overlaps:
    """Detections and ground-truth objects of all images, and the pairs that overlap.

    Attributes:
        images: Number of images.
        image: Image index of each detection, ``(D,)``. Detections are sorted by image and, within
            an image, by decreasing score.
        classes: Class of each detection, ``(D,)``.
        scores: Score of each detection, ``(D,)``.
        areas: Area of each detection in square pixels, ``(D,)``.
        object_image: Image index of each object, ``(G,)``.
        object_classes: Class of each object, ``(G,)``.
        object_areas: Area of each object in square pixels, ``(G,)``.
        crowd: True for crowds (regions with many objects), ``(G,)``.
        detection: Index of the detection in each overlapping pair, ``(P,)``.
        object: Index of the object in each overlapping pair, ``(P,)``.
        iou: IoU of each pair, at least :data:`LEAST_OVERLAP`, ``(P,)``. For a crowd, the fraction
            of the detection that is inside the crowd.
    """

    images: int
    image: Ints
    classes: Ints
    scores: Floats
    areas: Floats
    object_image: Ints
    object_classes: Ints
    object_areas: Floats
    crowd: Bools
    detection: Ints
    object: Ints
    iou: Floats

    @property
    def same_class(self) -> Bools:
        """Mask of the pairs in which the detection and the object have the same class, ``(P,)``."""
        return self.classes[self.detection] == self.object_classes[self.object]


def find_overlaps(
    objects: Sequence[ImageObjects], detections: Sequence[ImageDetections]
) -> Overlaps:
    """Compute the IoU of each detection with each ground-truth object in the same image.

    Args:
        objects: The ground-truth objects in each image.
        detections: The detections in each image, in the same order.
    """
    firsts, seconds, values, areas, orders = [], [], [], [], []
    at_detection, at_object = 0, 0
    for there, found in zip(objects, detections, strict=True):
        order = np.argsort(-np.asarray(found.scores, float), kind="stable")
        regions = _select(found.regions, order)
        orders.append(at_detection + order)
        areas.append(_areas(regions))
        if len(order) and len(there.classes):
            crowd = np.asarray(there.crowd, np.uint8)
            iou = coco_mask.iou(regions, _select(there.regions, slice(None)), crowd)
            first, second = np.nonzero(iou >= LEAST_OVERLAP)
            firsts.append(at_detection + first)
            seconds.append(at_object + second)
            values.append(iou[first, second])
        at_detection += len(order)
        at_object += len(there.classes)
    sort = _joined(orders, np.int64)
    return Overlaps(
        images=len(objects),
        image=np.repeat(np.arange(len(objects)), [len(found.classes) for found in detections]),
        classes=_joined([found.classes for found in detections], np.int64)[sort],
        scores=_joined([found.scores for found in detections], np.float64)[sort],
        areas=_joined(areas, np.float64),
        object_image=np.repeat(np.arange(len(objects)), [len(there.classes) for there in objects]),
        object_classes=_joined([there.classes for there in objects], np.int64),
        object_areas=_joined([there.areas for there in objects], np.float64),
        crowd=_joined([there.crowd for there in objects], np.bool_),
        detection=_joined(firsts, np.int64),
        object=_joined(seconds, np.int64),
        iou=_joined(values, np.float64),
    )


def _select(regions: Regions, order: NDArray | slice) -> Regions:
    if isinstance(regions, np.ndarray):
        return np.asarray(regions, np.float64).reshape(-1, 4)[order]
    return [regions[place] for place in np.arange(len(regions))[order]]


def _areas(regions: Regions) -> NDArray:
    if isinstance(regions, np.ndarray):
        return regions[:, 2] * regions[:, 3]
    return np.asarray(coco_mask.area(list(regions)) if len(regions) else [], np.float64)


def _joined(parts: Sequence[NDArray], dtype: type) -> NDArray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)


def rank_in_group(*keys: NDArray) -> Ints:
    """Return the position of each element among the elements with equal keys, ``(N,)``.

    Positions start at 0 and follow the order of the arrays.
    """
    order = np.lexsort(keys)
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    start = np.flatnonzero(new)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(start, np.diff([*start, len(order)]))
    return rank


def greedy_matches(
    overlaps: Overlaps,
    pairs: NDArray,
    rank: Ints,
    thresholds: Floats,
    *,
    ignored: Bools,
    first_of_equal: bool = False,
) -> Ints:
    """Match detections to ground-truth objects greedily, in the order of the detections' ranks.

    Each detection is matched to the unmatched object with the highest IoU. As in the COCO metrics,
    an ignored object is matched only if no other object is available, and a crowd can be matched
    repeatedly.

    Args:
        overlaps: The detections and objects, with the IoU of each overlapping pair.
        pairs: The indices of the pairs that may be matched.
        rank: The rank of each detection, ``(D,)``; rank 0 is matched first. Detections of the same
            rank must not be paired with the same object.
        thresholds: The minimum IoU for a match, ``(T,)``.
        ignored: True for objects that are ignored, ``(G,)``.
        first_of_equal: If True, match the first of several objects with equal IoU, otherwise the
            last one.

    Returns:
        The index of the object matched to each detection, or -1 for unmatched detections,
        ``(T, D)``.
    """
    detection, target = overlaps.detection[pairs], overlaps.object[pairs]
    iou = overlaps.iou[pairs]
    ties = target if first_of_equal else -target
    order = np.lexsort((ties, -iou, ignored[target], detection, rank[detection]))
    detection, target, iou = detection[order], target[order], iou[order]
    matches = np.full((len(thresholds), len(overlaps.scores)), -1)
    free = np.ones((len(thresholds), len(overlaps.crowd)), bool)
    bounds = np.searchsorted(rank[detection], np.arange(rank[detection].max(initial=-1) + 2))
    # All detections with equal ranks are matched at once, because they share no objects.
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        some, theirs, overlap = detection[begin:end], target[begin:end], iou[begin:end]
        for row, threshold in enumerate(thresholds):
            # pycocotools reduces a threshold of 1 slightly, because rounding can reduce the IoU.
            good = np.flatnonzero(free[row, theirs] & (overlap >= min(threshold, 1 - 1e-10)))
            best = good[_starts(some[good])]
            matches[row, some[best]] = theirs[best]
            free[row, theirs[best]] = overlaps.crowd[theirs[best]]
    return matches


def _starts(values: NDArray) -> Bools:
    """Return a mask of the first element in each run of equal values in a sorted array."""
    start = np.ones(len(values), bool)
    start[1:] = values[1:] != values[:-1]
    return start


@dataclass(frozen=True)
class Matches:
    """Matches of D detections to G ground-truth objects of the same class at T IoU thresholds.

    Attributes:
        hit: True for true positives, ``(T, D)``.
        ignored: True for detections that are neither true nor false positives, ``(T, D)``.
        match: Index of the object matched to each detection, or -1 for unmatched detections,
            ``(T, D)``.
        counted: True for objects that are not ignored, ``(G,)``.
        considered: Indices of the highest-scoring detections of each image and class, sorted by
            class and then by decreasing score, ``(N,)``.
    """

    hit: Bools
    ignored: Bools
    match: Ints
    counted: Bools
    considered: Ints


def match_by_class(
    overlaps: Overlaps,
    *,
    area: tuple[float, float] = (0, np.inf),
    thresholds: Floats = IOU_THRESHOLDS,
    max_detections: int = 100,
) -> Matches:
    """Match detections to ground-truth objects of the same class, as in the COCO metrics.

    Args:
        overlaps: The detections and objects, with the IoU of each overlapping pair.
        area: The minimum and maximum object area in square pixels. Objects outside this range are
            ignored.
        thresholds: The minimum IoU for a match, ``(T,)``.
        max_detections: The maximum number of detections per image and class.
    """
    rank = rank_in_group(overlaps.classes, overlaps.image)
    considered = rank < max_detections
    areas = overlaps.object_areas
    counted = ~overlaps.crowd & (areas >= area[0]) & (areas <= area[1])
    pairs = np.flatnonzero(overlaps.same_class & considered[overlaps.detection])
    match = greedy_matches(overlaps, pairs, rank, thresholds, ignored=~counted)
    matched = match >= 0
    hit = np.zeros_like(matched)
    hit[matched] = counted[match[matched]]
    outside = (overlaps.areas < area[0]) | (overlaps.areas > area[1])
    order = np.lexsort((-overlaps.scores, overlaps.classes))
    return Matches(
        hit=hit,
        ignored=(matched & ~hit) | (~matched & outside),
        match=match,
        counted=counted,
        considered=order[considered[order]],
    )


def class_slices(classes: Ints, count: int) -> Iterator[slice]:
    """Yield the slice of each of ``count`` classes in an array sorted by class."""
    bounds = np.searchsorted(classes, np.arange(count + 1))
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(begin, end)


def precision_at_recalls(
    hit: Bools, count: int, recalls: Floats, *, least: float = np.spacing(1)
) -> Floats:
    """Return the interpolated precision at given recalls.

    Args:
        hit: True for true positives and False for false positives, by decreasing score, ``(N,)``.
        count: The number of objects.
        recalls: The recalls in [0, 1], ``(R,)``.
        least: A small number that is added to the denominator of the precision, as in pycocotools.

    Returns:
        The largest precision at or above each recall, or 0 for recalls that aren't reached,
        ``(R,)``.
    """
    true = np.cumsum(hit, dtype=np.float64)
    precision = true / (np.arange(1, len(hit) + 1) + least)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return np.append(best, 0)[np.searchsorted(true / count, recalls)]


def precisions(
    overlaps: Overlaps, matches: Matches, classes: int, images: Bools | None = None
) -> Floats:
    """Return the interpolated precision of each class at the recalls used by pycocotools.

    Args:
        overlaps: The detections and objects, with the IoU of each overlapping pair.
        matches: The matches of these detections and objects.
        classes: The number of classes.
        images: True for the images to consider, ``(images,)``. If None, all are considered.

    Returns:
        The precision by class, IoU threshold and recall, or NaN for classes without objects,
        ``(C, T, 101)``.
    """
    order, counted = matches.considered, matches.counted
    if images is not None:
        order = order[images[overlaps.image[order]]]
        counted = counted & images[overlaps.object_image]
    objects = np.bincount(overlaps.object_classes[counted], minlength=classes)
    found = np.full((classes, len(matches.hit), len(RECALLS)), np.nan)
    for label, part in enumerate(class_slices(overlaps.classes[order], classes)):
        if not objects[label]:
            continue
        mine = order[part]
        for row, (hit, ignored) in enumerate(
            zip(matches.hit[:, mine], matches.ignored[:, mine], strict=True)
        ):
            found[label, row] = precision_at_recalls(hit[~ignored], objects[label], RECALLS)
    return found
