"""Conversion of shapes drawn in annotation tools to bounding boxes and segmentations.

The y axis points down, so positive angles are clockwise rotations.
"""

import math
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from senet_transfer.data.detection.formats.records import Segmentation

Box = tuple[float, float, float, float]

# Number of points of the polygons that approximate ellipses, as in VIA's own COCO export.
_ELLIPSE_POINTS = 72


def box_of(points: Sequence[Sequence[float]]) -> Box:
    """Return the smallest box that contains all points."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    return min(xs), min(ys), max(xs), max(ys)


def polygon(points: Sequence[Sequence[float]]) -> tuple[Box, Segmentation]:
    """Return the bounding box of a polygon and its segmentation in COCO format."""
    return box_of(points), [[float(value) for point in points for value in point]]


def rotated_box(
    box: Box, degrees: float, pivot: tuple[float, float] | None = None
) -> tuple[Box, Segmentation | None]:
    """Return the bounding box and segmentation of a rotated rectangle.

    The segmentation is None if the rectangle is not rotated.

    Args:
        box: The rectangle before the rotation: left, top, right and bottom edges.
        degrees: The clockwise rotation angle.
        pivot: The centre of rotation; None selects the centre of the rectangle.
    """
    if degrees % 360 == 0:
        return box, None
    left, top, right, bottom = box
    x, y = pivot or ((left + right) / 2, (top + bottom) / 2)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return polygon(
        [(x + (a - x) * cos - (b - y) * sin, y + (a - x) * sin + (b - y) * cos) for a, b in corners]
    )


def ellipse(
    x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0
) -> tuple[Box, Segmentation]:
    """Return the exact bounding box of an ellipse, and a polygon that approximates the ellipse.

    Args:
        x: The x coordinate of the centre.
        y: The y coordinate of the centre.
        radius_x: The horizontal radius before the rotation.
        radius_y: The vertical radius before the rotation.
        degrees: The clockwise rotation angle.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    angles = np.arange(_ELLIPSE_POINTS) * (2 * math.pi / _ELLIPSE_POINTS)
    a, b = radius_x * np.cos(angles), radius_y * np.sin(angles)
    points = np.stack([x + a * cos - b * sin, y + a * sin + b * cos], axis=1)
    half_width = math.hypot(radius_x * cos, radius_y * sin)
    half_height = math.hypot(radius_x * sin, radius_y * cos)
    box = x - half_width, y - half_height, x + half_width, y + half_height
    return box, [points.ravel().tolist()]


def mask(
    pixels: np.ndarray, left: int, top: int, width: int, height: int
) -> tuple[Box, Segmentation] | None:
    """Return the bounding box and run-length encoding of a mask; None if the mask is empty.

    Args:
        pixels: Boolean mask for a region of the image.
        left: The first image column of the region.
        top: The first image row of the region.
        width: The image width.
        height: The image height.
    """
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        return None
    whole = np.zeros((height, width), np.uint8, order="F")
    whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    encoded = coco_mask.encode(whole)
    segmentation = {"size": [height, width], "counts": encoded["counts"].decode("ascii")}
    box = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
    return tuple(map(float, box)), segmentation  # type: ignore[return-value]
