"""Unusual annotations, which are often mistakes, and unusual images.

Each check finds annotations or images, and assigns a score to each of them. The scores of sizes,
aspect ratios and counts are robust deviations: the distance from the median, divided by 1.4826
times the median absolute deviation. For normally distributed values, this divisor is the standard
deviation. The deviations are computed from the logarithms of sizes and aspect ratios, and from the
square roots of counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from senet_transfer.analysis.dataset_page.fingerprints import LEAST_CONTRAST
from senet_transfer.analysis.dataset_page.splits import Objects

# Minimum shorter side of a box in pixels; smaller boxes can't be learned.
LEAST_SIDE = 2.0
# Thresholds for reporting boxes: fraction outside the image, and IoU of two almost identical boxes
# of the same class and of different classes.
OUTSIDE, SAME, SAME_OTHER_CLASS = 0.05, 0.9, 0.8
# Minimum robust deviations of unusual sizes and aspect ratios, and of unusual object counts.
DEVIATION, FEW = 4.0, 3.0
# Classes with fewer objects have no reliable median.
LEAST_OBJECTS = 10
# Boxes closer than this many pixels to the border of the image may be cut off.
_BORDER = 2.0
# Minimum assumed standard deviations. For the square root of a Poisson variable, it is 0.5.
_LEAST_SPREAD, _COUNT_SPREAD = 0.1, 0.5

KINDS = {
    "degenerate": f"box with a side shorter than {LEAST_SIDE:g} pixels",
    "outside": f"more than {OUTSIDE:.0%} of the box outside the image",
    "few": f"image with far fewer objects than the others (deviation of {FEW:g} or more)",
    "duplicate": f"two boxes of the same class with an IoU of {SAME:g} or more",
    "conflict": f"two boxes of different classes with an IoU of {SAME_OTHER_CLASS:g} or more",
    "size": f"unusual size for the class (deviation of {DEVIATION:g} or more)",
    "aspect": f"unusual aspect ratio for the class (deviation of {DEVIATION:g} or more)",
}
IMAGE_KINDS = {
    "blank": f"image almost without contrast (standard deviation below {LEAST_CONTRAST:g})",
    "size": f"unusual size (deviation of {DEVIATION:g} or more)",
    "aspect": f"unusual aspect ratio (deviation of {DEVIATION:g} or more)",
}


@dataclass(frozen=True)
class Unusual:
    """An unusual annotation or image.

    Attributes:
        kind: A key of :data:`KINDS` or :data:`IMAGE_KINDS`.
        score: Score that ranks the annotations or images of this kind; the most unusual one has the
            highest score.
        image: Index of the image.
        objects: Indices of the objects; empty if the whole image is unusual.
        why: The reason, as a sentence.
        split: Index of the image's split, i.e. its training or evaluation dataset.
    """

    kind: str
    score: float
    image: int
    objects: tuple[int, ...]
    why: str
    split: int = 0


def deviations(values: np.ndarray, least_spread: float = _LEAST_SPREAD) -> np.ndarray:
    """Return each value's distance from the median, in robust standard deviations.

    The distance is negative for values below the median. The standard deviation is estimated as
    1.4826 times the median absolute deviation, but at least ``least_spread``.
    """
    middle = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - middle))
    return (values - middle) / max(spread, least_spread)


def select(found: Sequence[Unusual], count: int) -> list[Unusual]:
    """Select up to ``count`` unusual annotations and images, each object or image at most once.

    The result starts with the most unusual annotation or image of each kind, followed by the second
    most unusual of each kind, and so on.
    """
    ranked: dict[str, list[Unusual]] = {}
    for item in sorted(found, key=lambda item: (-item.score, item.split, item.image)):
        ranked.setdefault(item.kind, []).append(item)
    order = [kind for kind in {**KINDS, **IMAGE_KINDS} if kind in ranked]
    turns = [
        (turn, order.index(kind), item) for kind in order for turn, item in enumerate(ranked[kind])
    ]
    chosen: dict[tuple, Unusual] = {}
    for _, _, item in sorted(turns, key=lambda row: row[:2]):
        chosen.setdefault((item.split, item.image, item.objects[:1]), item)
    return list(chosen.values())[:count]


def unusual_annotations(objects: Objects, classes: Sequence[str]) -> list[Unusual]:
    """Find unusual annotations of all kinds in :data:`KINDS` in detection data."""
    return [
        *_degenerate(objects, classes),
        *_outside(objects, classes),
        *_few(objects),
        *_overlapping(objects, classes),
        *_extreme(objects, classes),
    ]


def _degenerate(objects: Objects, classes: Sequence[str]) -> Iterator[Unusual]:
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    for index in np.flatnonzero(sides.min(1) < LEAST_SIDE):
        width, height = sides[index]
        yield Unusual(
            "degenerate", -float(width * height), int(objects.images[index]), (int(index),),
            f"The box of this {classes[objects.classes[index]]} is {width:.3g} x {height:.3g} "
            "pixels.",
        )  # fmt: skip


def _outside(objects: Objects, classes: Sequence[str]) -> Iterator[Unusual]:
    sizes = objects.sizes[objects.images].astype(np.float64)
    clipped = objects.boxes.clip(0, np.tile(sizes, 2))
    areas, inside = (_areas(boxes) for boxes in (objects.boxes, clipped))
    part = 1 - inside / np.maximum(areas, 1e-9)
    for index in np.flatnonzero((part > OUTSIDE) & (areas > 0)):
        width, height = sizes[index].astype(int)
        yield Unusual(
            "outside", float(part[index]), int(objects.images[index]), (int(index),),
            f"{part[index]:.0%} of the box of this {classes[objects.classes[index]]} is outside "
            f"the image of {width} x {height} pixels.",
        )  # fmt: skip


def _few(objects: Objects) -> Iterator[Unusual]:
    counts = objects.counts
    low, middle, high = (int(value) for value in np.percentile(counts, (25, 50, 75)))
    deviation = -deviations(np.sqrt(counts), _COUNT_SPREAD)
    for image in np.flatnonzero(deviation >= FEW):
        count = counts[image]
        yield Unusual(
            "few", float(deviation[image]), int(image), (),
            f"{'One object is' if count == 1 else f'{count} objects are'} annotated here. The "
            f"median is {middle}, and half of the images have {low} to {high} objects. Check that "
            "all objects are annotated.",
        )  # fmt: skip


def _overlapping(objects: Objects, classes: Sequence[str]) -> Iterator[Unusual]:
    boxes = np.concatenate(
        [objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], axis=1
    )
    ends = np.cumsum(objects.counts)
    for image, (first, end) in enumerate(zip(ends - objects.counts, ends, strict=True)):
        if end - first < 2:
            continue
        own = boxes[first:end]
        overlaps = np.triu(coco_mask.iou(own, own, np.zeros(len(own), np.uint8)), 1)
        for one, other in np.argwhere(overlaps >= SAME_OTHER_CLASS) + first:
            overlap = float(overlaps[one - first, other - first])
            names = [classes[objects.classes[index]] for index in (one, other)]
            same = names[0] == names[1]
            if overlap < (SAME if same else SAME_OTHER_CLASS):
                continue
            what = f"Two boxes of class {names[0]}"
            if not same:
                what = f"A box of class {names[0]} and one of class {names[1]}"
            yield Unusual(
                "duplicate" if same else "conflict", overlap, image, (int(one), int(other)),
                f"{what} are almost the same (IoU {overlap:.2f}).",
            )  # fmt: skip


def _extreme(objects: Objects, classes: Sequence[str]) -> Iterator[Unusual]:
    sides = np.maximum(objects.boxes[:, 2:] - objects.boxes[:, :2], 1e-9)
    usable = sides.min(1) >= LEAST_SIDE  # The other boxes are degenerate.
    # Objects at the border may be cut off, which makes them smaller and more elongated.
    sizes = objects.sizes[objects.images]
    whole = (objects.boxes[:, :2] > _BORDER).all(1) & (objects.boxes[:, 2:] < sizes - _BORDER).all(
        1
    )
    for label, name in enumerate(classes):
        indices = np.flatnonzero((objects.classes == label) & usable)
        if len(indices) < LEAST_OBJECTS:
            continue
        width, height = sides[indices].T
        for kind, values, text in (
            ("size", np.sqrt(width * height), "has a size (square root of its area) of {0:.0f} "
             "pixels; the median of the class is {1:.0f}"),
            ("aspect", width / height, "has an aspect ratio (width / height) of {0:.2g}; the "
             "median of the class is {1:.2g}"),
        ):  # fmt: skip
            deviation = deviations(np.log(values))
            judged = whole[indices] | ((kind == "size") & (deviation > 0))
            for k in np.flatnonzero((np.abs(deviation) >= DEVIATION) & judged):
                index, score = int(indices[k]), float(abs(deviation[k]))
                yield Unusual(
                    kind, score, int(objects.images[index]), (index,),
                    f"This {name} {text.format(values[k], np.median(values))}: "
                    f"{score:.1f} robust deviations.",
                )  # fmt: skip


def unusual_images(index: np.ndarray, sizes: np.ndarray, contrast: np.ndarray) -> list[Unusual]:
    """Find blank images, and images with an unusual size or aspect ratio.

    See :class:`~.fingerprints.Fingerprints` for the arguments.
    """
    if not len(index):
        return []
    found = []
    for row in np.flatnonzero(contrast < LEAST_CONTRAST):
        found.append(
            Unusual(
                "blank", -float(contrast[row]), int(index[row]), (),
                f"The brightness has a standard deviation of {contrast[row]:.1f} intensity levels.",
            )
        )  # fmt: skip
    width, height = sizes.T.astype(np.float64)
    for kind, values in (("size", np.sqrt(width * height)), ("aspect", width / height)):
        deviation = deviations(np.log(values))
        for row in np.flatnonzero(np.abs(deviation) >= DEVIATION):
            score = float(abs(deviation[row]))
            usual = np.median(sizes, axis=0).astype(int)
            found.append(
                Unusual(
                    kind, score, int(index[row]), (),
                    f"The image is {width[row]:.0f} x {height[row]:.0f} pixels; the medians "
                    f"are {usual[0]} x {usual[1]}: {score:.1f} robust deviations.",
                )
            )  # fmt: skip
    return found


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
