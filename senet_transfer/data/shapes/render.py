"""Renderer for the shapes dataset. It also computes each shape's mask and visible fraction."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

SHAPE_CLASSES = ("circle", "square", "triangle", "star", "cross")
SHAPE_KEYPOINTS = ("left", "right", "top", "bottom")
SHAPE_SPLITS = ("train", "val", "tiny")

IMAGE_SIDES = (128, 192)  # pixels, inclusive
SHAPE_SIZES = (16.0, 96.0)  # pixels, the longer side of the complete shape's bounding box
MAX_SHAPES = 6
# Maximum rotation in degrees, in either direction. With arbitrary rotations, a small detector would
# need more iterations than fit into a demo of a few minutes.
MAX_TURN = 20.0

# Shapes with a smaller visible fraction are not annotated, because usually only a straight or round
# edge is visible, which does not reveal the class or extent.
MIN_VISIBLE = 0.25
# A shape is placed so that at least this fraction of every shape below it remains visible, if one
# of PLACEMENT_TRIES positions allows it. Heavily occluded images are of little use for training.
COMFORTABLE_VISIBLE = 0.5
# Fraction of shapes that are placed on top of another shape, if one of PLACEMENT_TRIES positions
# allows it. By chance, few shapes would overlap.
OVERLAPPING = 0.5
PLACEMENT_TRIES = 4

OVERSAMPLING = 4


@dataclass(frozen=True)
class ShapeObject:
    """Annotated shape in an image.

    Attributes:
        category: Class name, one of `SHAPE_CLASSES`.
        mask: Visible pixels of the shape, bool (H, W).
        visible: Visible fraction of the complete shape, from 0 to 1. Parts that are occluded by
            other shapes or outside the image do not count as visible.
    """

    category: str
    mask: np.ndarray
    visible: float


@dataclass(frozen=True)
class _Layer:
    """Geometric shape, as rendered before other shapes are drawn over it."""

    category: str
    coverage: np.ndarray  # float32 (H, W), 0-1, antialiased
    area: float  # square pixels, including parts outside the image

    @property
    def mask(self) -> np.ndarray:
        return self.coverage > 0.5


def render_image(seed: int, split: str, index: int) -> tuple[np.ndarray, list[ShapeObject]]:
    """Render one image of the dataset.

    The image depends only on the three arguments, not on the size of the dataset.

    Args:
        seed: Non-negative random seed of the dataset.
        split: One of `SHAPE_SPLITS`.
        index: Number of the image in its split, starting at 1. It is also the image's COCO id and
            file name.

    Returns:
        The image, RGB uint8 (H, W, 3), and its annotated shapes (at least one) in the order in
        which they were drawn. Later shapes occlude earlier ones.
    """
    rng = np.random.default_rng([seed, SHAPE_SPLITS.index(split), index])
    height, width = (int(side) for side in rng.integers(*IMAGE_SIDES, size=2, endpoint=True))
    categories = list(rng.choice(SHAPE_CLASSES, size=rng.integers(1, MAX_SHAPES, endpoint=True)))
    # The topmost shape is never occluded, so even the tiny split contains every class.
    categories[-1] = SHAPE_CLASSES[index % len(SHAPE_CLASSES)]

    image, colours = _background(rng, height, width)
    layers = _arrange(rng, categories, height, width)
    for layer in layers:
        colours.append(_contrasting_colour(rng, colours))
        _paint(rng, image, layer.coverage, colours[-1])
    image += rng.normal(0, 3, (height, width, 1))

    visible = zip(layers, _visible_masks(layers), _visible_fractions(layers), strict=True)
    objects = [
        ShapeObject(str(layer.category), mask, fraction)
        for layer, mask, fraction in visible
        if fraction >= MIN_VISIBLE
    ]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), objects


def _background(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a textured image, float32 (H, W, 3), and its two muted colours."""
    base = _from_hsv(rng.uniform(0, 360), rng.uniform(0.05, 0.35), rng.uniform(0.3, 0.85))
    other = np.clip(base * rng.uniform(0.65, 0.85) + rng.uniform(-12, 12, 3), 0, 255)

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(10, 40)
    along = (x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period
    across = (y * math.cos(angle) - x * math.sin(angle)) * 2 * math.pi / period
    noise = _cloud_noise(rng, height, width)
    pattern = (
        noise,
        0.5 + 0.5 * np.sin(along + 4 * noise),  # ripples
        (np.sin(along) > 0).astype(np.float32),  # stripes
        ((np.sin(along) > 0) ^ (np.sin(across) > 0)).astype(np.float32),  # checks
    )[rng.integers(4)]
    blend = (0.6 * pattern + 0.4 * noise)[..., None]
    return (base * (1 - blend) + other * blend).astype(np.float32), [base, other]


def _cloud_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return smooth noise at several scales, float32 (H, W), with values from 0 to 1."""
    noise = np.zeros((height, width), np.float32)
    for cells in (3, 6, 12, 48):
        grid = rng.random((cells, cells), dtype=np.float32) / math.sqrt(cells)
        noise += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return (noise - noise.min()) / (noise.max() - noise.min())


def _from_hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert a colour from HSV to RGB, float32 (3,) in [0, 255].

    The hue is in degrees, and the saturation and value are in [0, 1].
    """
    pixel = np.array([[[hue, saturation, value]]], np.float32)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0] * 255


def _contrasting_colour(rng: np.random.Generator, taken: list[np.ndarray]) -> np.ndarray:
    """Sample vivid RGB colours, and return the one that differs most from the colours in use."""
    candidates = [
        _from_hsv(rng.uniform(0, 360), rng.uniform(0.55, 1.0), rng.uniform(0.5, 1.0))
        for _ in range(8)
    ]
    # Distances in CIELAB approximate perceived differences.
    lab = [
        cv2.cvtColor(np.array([colours], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
        for colours in (candidates, taken)
    ]
    distances = np.linalg.norm(lab[0][:, None] - lab[1][None], axis=2)
    return candidates[int(distances.min(axis=1).argmax())]


def _outline(category: str) -> np.ndarray:
    """Return a shape class's outline, upright and centred on the origin, float64 `(points, 2)`."""
    if category == "cross":
        arm = np.array([[1, -0.34], [1, 0.34], [0.34, 0.34]])
        turn = np.array([[0, 1], [-1, 0]])
        return np.concatenate([arm @ np.linalg.matrix_power(turn, k) for k in range(4)])
    # Distances from the centre to the vertices, which are at equal angles.
    radii = {
        "circle": [1.0] * 64,
        "square": [1.0] * 4,
        "triangle": [1.0] * 3,
        "star": [1.0, 0.42] * 5,
    }[category]
    first = math.pi / 4 if category == "square" else -math.pi / 2
    angles = first + np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.array(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _place(rng: np.random.Generator, category: str, height: int, width: int) -> _Layer:
    """Place a shape with random size, proportions, rotation and position."""
    points = _outline(category) * (1, rng.uniform(0.85, 1.0))
    angle = math.radians(rng.uniform(-MAX_TURN, MAX_TURN))
    cos, sin = math.cos(angle), math.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    # Log-uniform: shapes from 16 to 32 pixels are as frequent as shapes from 32 to 64 pixels.
    size = math.exp(rng.uniform(*np.log(SHAPE_SIZES)))
    points *= size / np.ptp(points, axis=0).max()
    # As in photographs, shapes may extend beyond the image by a fraction of their size.
    margin = 0.4 * size
    points += rng.uniform((margin, margin), (width - margin, height - margin))

    canvas = np.zeros((height * OVERSAMPLING, width * OVERSAMPLING), np.uint8)
    # OpenCV's integer coordinates refer to pixel centres, half a pixel from the pixel edges.
    cv2.fillPoly(canvas, [np.rint(points * OVERSAMPLING - 0.5).astype(np.int32)], 255)
    coverage = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    area = cv2.contourArea(points.astype(np.float32))
    return _Layer(category, coverage.astype(np.float32) / 255, area)


def _arrange(
    rng: np.random.Generator, categories: list[str], height: int, width: int
) -> list[_Layer]:
    """Place shapes at random. Each shape is drawn on top of the previous ones."""
    layers: list[_Layer] = []
    for category in categories:
        overlap = rng.random() < OVERLAPPING
        for _ in range(PLACEMENT_TRIES):
            placed = _place(rng, category, height, width)
            if overlap == any((placed.mask & x.mask).any() for x in layers) and (
                min(_visible_fractions([*layers, placed])) >= COMFORTABLE_VISIBLE
            ):
                break
        layers.append(placed)
    return layers


def _visible_masks(layers: list[_Layer]) -> list[np.ndarray]:
    """Return a bool mask (H, W) of the visible pixels of each drawn layer."""
    hidden = np.zeros_like(layers[0].mask)
    masks = []
    for layer in reversed(layers):
        masks.append(layer.mask & ~hidden)
        hidden |= layer.mask
    return masks[::-1]


def _visible_fractions(layers: list[_Layer]) -> list[float]:
    """Return the visible fraction of each shape, from 0 to 1."""
    masks = _visible_masks(layers)
    # Rounding at the edge can give a small shape more pixels than its area.
    return [min(mask.sum() / x.area, 1.0) for x, mask in zip(layers, masks, strict=True)]


def _paint(
    rng: np.random.Generator, image: np.ndarray, coverage: np.ndarray, colour: np.ndarray
) -> None:
    """Paint one shape and its shadow onto a float32 RGB image, in place."""
    height, width = coverage.shape
    shift = np.array([[1, 0, rng.uniform(-3, 3)], [0, 1, rng.uniform(1, 3)]], np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(coverage, shift, (width, height)), (0, 0), 2)
    image *= 1 - 0.35 * shadow[..., None]

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = x * math.cos(angle) + y * math.sin(angle)
    inside = ramp[coverage > 0]
    ramp = (ramp - inside.min()) / max(float(np.ptp(inside)), 1.0)
    shade = 0.85 + 0.25 * np.clip(ramp, 0, 1) + 0.1 * (_cloud_noise(rng, height, width) - 0.5)
    # A darker rim separates overlapping shapes of similar colours.
    rim = coverage - cv2.erode(coverage, np.ones((3, 3), np.uint8))
    filled = colour * (shade * (1 - 0.4 * rim))[..., None]
    alpha = coverage[..., None]
    image += alpha * (filled - image)
