"""Validation of segmentations in COCO format: polygons and run-length encodings (RLE)."""

import math
from typing import Any

import numpy as np

# A polygon requires three points, but tools also export points and lines as polygons.
_MIN_COORDINATES = 6

# Larger coordinates are certainly wrong, and their sum could overflow.
_LIMIT = 1e100

Problem = tuple[str, str]


def segmentation_problem(segmentation: object, width: int, height: int) -> Problem | None:
    """Return the error in a segmentation and the expected value; None if it is valid or missing.

    Args:
        segmentation: Value of a `segmentation` key: a list of polygons, a run-length encoding, or
            an empty value if the object has no segmentation.
        width: Image width in pixels.
        height: Image height in pixels.
    """
    if not segmentation and (segmentation is None or isinstance(segmentation, list | dict)):
        return None
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, width, height)
    if isinstance(segmentation, list):
        return _polygons_problem(segmentation, width, height)
    return (
        f"has a segmentation {str(segmentation)[:40]!r} of type {type(segmentation).__name__}",
        "a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...], or {counts, size}",
    )


def usable_polygons(polygons: list[list[float]]) -> list[list[float]]:
    """Return the polygons with at least three points, as Detectron2's `load_coco_json` does."""
    return [polygon for polygon in polygons if len(polygon) >= _MIN_COORDINATES]


def _polygons_problem(polygons: list, width: int, height: int) -> Problem | None:
    if all(_is_number(part) for part in polygons):
        found = f"has a segmentation that is a flat list of {len(polygons)} numbers"
        return found, "a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...]"
    for index, polygon in enumerate(polygons):
        problem = _coordinates_problem(polygon)
        if problem:
            found, expected = problem
            return f"has segmentation[{index}] {found}", expected
    usable = usable_polygons(polygons)
    if not usable:
        points = max(len(polygon) for polygon in polygons) // 2
        return f"has a segmentation of {points} points", "a polygon with at least three points"
    least_x = min(min(polygon[0::2]) for polygon in usable)
    least_y = min(min(polygon[1::2]) for polygon in usable)
    most_x = max(max(polygon[0::2]) for polygon in usable)
    most_y = max(max(polygon[1::2]) for polygon in usable)
    if most_x <= 0 or most_y <= 0 or least_x >= width or least_y >= height:
        found = (
            f"has a segmentation from ({least_x:g}, {least_y:g}) to ({most_x:g}, {most_y:g}), "
            f"which is outside its image of {width}x{height} pixels"
        )
        return found, "coordinates in pixels relative to the image's top left corner"
    return None


def _coordinates_problem(polygon: object) -> Problem | None:
    expected = "a list of finite numbers, [x1, y1, x2, y2, x3, y3, ...]"
    if not isinstance(polygon, list):
        return f"{str(polygon)[:40]!r}", expected
    try:
        # The built-in functions are many times faster than a loop. The sum is NaN or infinite if
        # one of the numbers is NaN or infinite, and raises TypeError for text and lists.
        finite = math.isfinite(sum(polygon)) and bool not in map(type, polygon)
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        wrong = next((part for part in polygon if not _is_coordinate(part)), polygon[0])
        return f"that contains {str(wrong)[:40]}", expected
    if len(polygon) % 2:
        return f"with an odd number of coordinates ({len(polygon)})", "pairs of x and y"
    return None


def _is_number(value: object) -> bool:
    return type(value) is int or type(value) is float


def _is_coordinate(value: Any) -> bool:
    return _is_number(value) and abs(value) < _LIMIT


def _rle_problem(segmentation: dict, width: int, height: int) -> Problem | None:
    if "counts" not in segmentation or "size" not in segmentation:
        found = f"has a segmentation with the keys {list(segmentation)[:5]}"
        return found, "a run-length encoding, {counts, size: [height, width]}"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        found = f"has a run-length encoding of size {size!r}"
        if size == [width, height]:
            found += ", which is [width, height]"
        return found, f"[height, width] of its image, [{height}, {width}]"
    if isinstance(counts, list) and all(type(run) is int for run in counts):
        return _runs_problem(counts, width * height)
    runs = _decode_counts(counts) if isinstance(counts, str) else None
    if runs is None:
        found = f"has a run-length encoding with the counts {repr(counts)[:40]}"
        return found, "text as written by pycocotools, or a list of whole numbers"
    return _runs_problem(runs.tolist(), width * height)


def _runs_problem(runs: list[int], pixels: int) -> Problem | None:
    found = ""
    if runs and min(runs) < 0:
        found = f"has a run-length encoding with a run of {min(runs)} pixels"
    elif sum(runs) != pixels:
        found = f"has a run-length encoding whose runs add up to {sum(runs)} pixels"
        if _are_pairs(runs):
            found += "; the numbers look like pairs of start and length"
    expected = f"alternating run lengths of background and object that add up to {pixels} pixels"
    return (found, expected) if found else None


def _decode_counts(text: str) -> np.ndarray | None:
    """Decode the string of a compressed run-length encoding; return None if it is invalid.

    In this format of pycocotools, a number is stored in groups of 5 bits, with a sixth bit that is
    set in all groups except the last. From the fourth number on, the difference from the number two
    positions earlier is stored.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(~codes & 32)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 12:  # more than 60 bits
        return None
    place = np.arange(len(codes)) - np.repeat(first, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[last] & 16) > 0
    values -= np.where(negative, 1 << (5 * lengths), 0)
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def _are_pairs(runs: list[int]) -> bool:
    """Return True if a list probably contains (start, length) pairs instead of run lengths.

    In such a list, every second number is a start position, so these numbers increase.
    """
    starts = runs[0::2]
    return len(starts) > 2 and all(a < b for a, b in zip(starts, starts[1:], strict=False))
