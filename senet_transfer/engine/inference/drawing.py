"""Visualization of predictions, with one colour per class and labels that do not overlap."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import GenericMask, VisImage, Visualizer
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from senet_transfer.engine.inference.fonts import drawable_names

Colour = tuple[float, float, float]
# Left, top, right and bottom in pixels.
Rect = tuple[float, float, float, float]

# To keep labels legible, small images are enlarged until their shorter side has the first length.
# The second length limits the longer side, and the third number is the maximum scale factor.
_SHORT_SIDE, _LONG_SIDE, _ENLARGED = 480, 4096, 4.0
# Line width and text size, each as a fraction of the image size and as a minimum in pixels.
_LINE, _LEAST_LINE = 0.0033, 1.5
_TEXT, _LEAST_TEXT = 0.021, 12.0
_MASK_ALPHA = 0.45
# Number of labels above which they are drawn smaller, and the minimum factor for their size.
_MANY, _SMALLEST = 25, 0.75
# Maximum distance between a label and its object, as a multiple of the label's height.
_FARTHEST = 8
# Segments with fewer pixels are not drawn.
_LEAST_AREA = 10


def class_colour(index: int) -> Colour:
    """Return a class's fixed RGB colour in [0, 1]. Colours of adjacent indices differ strongly."""
    # Multiples of the golden ratio spread the hues evenly for any number of classes.
    lightness = (0.50, 0.64, 0.38)[index % 3]
    return colorsys.hls_to_rgb(index * 0.618034 % 1, lightness, 0.9)


def text_colour(background: Colour) -> str:
    """Return "black" or "white", whichever has the higher contrast (WCAG 2) with a background."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


@dataclass(frozen=True)
class ClassNames:
    """Class names to draw, and the fonts for them.

    Attributes:
        things: The names of object classes.
        stuff: The names of semantic segmentation classes.
        families: The font families, in the order of preference.
    """

    things: Sequence[str]
    stuff: Sequence[str]
    families: Sequence[str]

    @classmethod
    def of(cls, things: Sequence[str], stuff: Sequence[str] = ()) -> "ClassNames":
        """Create an instance with fonts for the given names.

        Names that can't be drawn are replaced; see :func:`~.fonts.drawable_names`.
        """
        drawn, families = drawable_names([*things, *stuff])
        return cls(drawn[: len(things)], drawn[len(things) :], families)


class PredictionDrawing(Visualizer):
    """Detectron2's visualizer with a fixed colour per class, and labels that do not overlap.

    If there is no free space for a label near its object, the label is omitted.

    Attributes:
        labels: The bounding boxes of all labels, in pixel coordinates of the image.
    """

    def __init__(self, image: np.ndarray, classes: ClassNames):
        """
        Args:
            image: An RGB image (H, W, 3) with values from 0 to 255.
            classes: The class names.
        """
        short, long = sorted(image.shape[:2])
        scale = max(1.0, min(_ENLARGED, _SHORT_SIDE / short, _LONG_SIDE / long))
        super().__init__(image, Metadata(), scale=scale)
        self._classes = classes
        # Scale with the size of the drawing. The default is too small for very elongated images.
        size = max(np.sqrt(self.output.width * self.output.height), long / 4) * scale
        self._line = max(_LEAST_LINE, _LINE * size)
        self._text = max(_LEAST_TEXT, _TEXT * size)
        self.labels: list[Rect] = []

    @property
    def image(self) -> np.ndarray:
        """The drawing as an RGB image (H, W, 3) with values from 0 to 255."""
        return self.output.get_image()

    def draw_instances(self, instances: Instances) -> None:
        """Draw detected objects: boxes or rotated boxes, masks, keypoints, classes and scores."""
        names = self._classes.things
        indices, scores = instances.pred_classes.tolist(), instances.scores.tolist()
        masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
        keypoints = instances.pred_keypoints if instances.has("pred_keypoints") else None
        # If there are many labels, they are drawn smaller, to hide less of the image.
        self._text *= np.clip(np.sqrt(_MANY / max(len(indices), 1)), _SMALLEST, 1)
        self.overlay_instances(
            boxes=instances.pred_boxes,
            masks=masks,
            keypoints=keypoints,
            labels=[f"{names[i]} {score:.0%}" for i, score in zip(indices, scores, strict=True)],
            assigned_colors=[class_colour(index) for index in indices],
        )

    def draw_classes(self, indices: Sequence[int], scores: Sequence[float]) -> None:
        """Draw a classifier's classes and probabilities as a list in the top left corner."""
        for index, score in zip(indices, scores, strict=True):
            bottom = self.labels[-1][3] if self.labels else 0.0
            label = f"{self._classes.things[index]} {score:.1%}"
            self._label(label, (0.0, bottom, 0.0, bottom), class_colour(index))

    def draw_segments(self, segments: dict[int, np.ndarray]) -> None:
        """Draw a semantic segmentation from the mask (H, W) of each class."""
        for index, mask in segments.items():
            if mask.sum() < _LEAST_AREA:
                continue
            # Objects and segments have separate indices.
            colour = class_colour(len(self._classes.things) + index)
            self.draw_binary_mask(mask, color=colour, alpha=_MASK_ALPHA)
            y, x = np.median(mask.nonzero(), axis=1)
            self._label(self._classes.stuff[index], (x, y, x, y), colour)

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: list[str] | None = None,
        masks: Any = None,
        keypoints: Any = None,
        assigned_colors: list[Colour] | None = None,
        alpha: float = _MASK_ALPHA,
    ) -> VisImage:
        """Draw the objects as Detectron2 does, then labels that do not overlap each other."""
        if masks is not None:
            shape = self.output.height, self.output.width
            masks = [np.asarray(mask, dtype=np.uint8) for mask in masks]
            drawn = [GenericMask(mask, *shape) for mask in masks]
        super().overlay_instances(
            boxes=boxes,
            masks=None if masks is None else drawn,
            keypoints=keypoints,
            assigned_colors=assigned_colors,
            alpha=alpha,
        )
        if labels and assigned_colors:
            rects = _bounds(boxes) if boxes is not None else map(_extent, masks)
            for label, rect, colour in zip(labels, rects, assigned_colors, strict=True):
                left, top, right, bottom = map(float, rect)
                self._label(label, (left, top, right, bottom), colour)
        return self.output

    def draw_box(
        self, box_coord: Any, alpha: float = 1.0, edge_color: Any = "g", line_style: str = "-"
    ) -> VisImage:
        """Draw a box whose line width depends on the image size, with a dark outline."""
        x0, y0, x1, y1 = box_coord
        self.output.ax.add_patch(
            Rectangle(
                (x0, y0),
                x1 - x0,
                y1 - y0,
                fill=False,
                edgecolor=edge_color,
                linewidth=self._points(self._line),
                linestyle=line_style,
                path_effects=self._outline(),
            )
        )
        return self.output

    def draw_line(
        self, x_data: Any, y_data: Any, color: Any, linestyle: str = "-", linewidth: Any = None
    ) -> VisImage:
        """Draw a line whose width depends on the image size."""
        # Detectron2 scales the width, which is in points.
        return super().draw_line(
            x_data, y_data, color, linestyle, self._points(self._line) / self.output.scale
        )

    def draw_circle(self, circle_coord: Any, color: Any, radius: float = 3) -> VisImage:
        """Draw a keypoint whose size depends on the image size."""
        return super().draw_circle(circle_coord, color, 1.5 * self._line / self.output.scale)

    def _points(self, pixels: float) -> float:
        return pixels * 72 / self.output.dpi

    def _outline(self) -> list[withStroke]:
        width = self._points(self._line) + self._points(1.5)
        return [withStroke(linewidth=width, foreground=(0, 0, 0, 0.55))]

    def _label(self, label: str, rect: Rect, colour: Colour) -> None:
        """Draw a label next to a bounding box if there is free space."""
        axes, scale = self.output.ax, self.output.scale
        text = axes.text(
            0,
            0,
            label,
            size=self._points(self._text),
            family=list(self._classes.families),
            color=text_colour(colour),
            verticalalignment="top",
            parse_math=False,  # treat "$" as text, not as math
            zorder=11,
        )
        extent = text.get_window_extent(self.output.canvas.get_renderer())
        pad = 0.15 * self._text / scale
        width, height = extent.width / scale + 2 * pad, extent.height / scale + 2 * pad
        size = (self.output.width, self.output.height)
        corner = free_corner(rect, (width, height), size, self.labels)
        if corner is None:
            text.remove()
            return
        x, y = corner
        self.labels.append((x, y, x + width, y + height))
        text.set_position((x + pad, y + pad))
        axes.add_patch(Rectangle((x, y), width, height, color=colour, linewidth=0, zorder=10))
        if gap := _connection(rect, self.labels[-1]):
            (x0, y0), (x1, y1) = gap
            axes.plot([x0, x1], [y0, y1], color=colour, linewidth=self._points(_LEAST_LINE))


def free_corner(
    rect: Rect, size: tuple[float, float], image: tuple[float, float], taken: Sequence[Rect]
) -> tuple[float, float] | None:
    """Return the top left corner for a label near an object, or None if there is no free space.

    Args:
        rect: The object's bounding box.
        size: The label's width and height.
        image: The image's width and height. The label must be inside the image.
        taken: The bounding boxes of the labels drawn so far.
    """
    (x0, y0, x1, y1), (w, h) = rect, size
    most_x, most_y = image[0] - w, image[1] - h
    if most_x < 0 or most_y < 0:
        return None
    preferred = [(x0, y0 - h), (x0, y0), (x0, y1), (x0, y1 - h), (x1 - w, y0 - h), (x1 - w, y1)]
    preferred += [(x1, y0), (x0 - w, y0)]
    # Then positions farther away, nearest first.
    steps = np.arange(-_FARTHEST, _FARTHEST + 0.5, 0.5) * h
    grid = np.stack(np.meshgrid(x0 + steps, y0 - h + steps), -1).reshape(-1, 2)
    grid = grid[np.argsort(np.hypot(*(grid - (x0, y0 - h)).T), kind="stable")]
    corners = np.concatenate([preferred, grid]).clip((0, 0), (most_x, most_y))
    if not taken:
        return tuple(corners[0].tolist())
    left, top, right, bottom = np.array(taken).T
    x, y = corners[:, :1], corners[:, 1:]
    covers = (x < right) & (x + w > left) & (y < bottom) & (y + h > top)
    free = np.flatnonzero(~covers.any(1))
    return tuple(corners[free[0]].tolist()) if len(free) else None


def _connection(rect: Rect, label: Rect) -> list[tuple[float, float]] | None:
    """Return the end points of a line from an object to its label.

    If the label touches the object, no line is needed, and None is returned.
    """
    ends = []
    for low, high in ((0, 2), (1, 3)):
        gap_before, gap_after = rect[low] - label[high], label[low] - rect[high]
        if gap_before > 0:
            ends.append((rect[low], label[high]))
        elif gap_after > 0:
            ends.append((rect[high], label[low]))
        else:
            middle = (max(rect[low], label[low]) + min(rect[high], label[high])) / 2
            ends.append((middle, middle))
    (x_object, x_label), (y_object, y_label) = ends
    if np.hypot(x_object - x_label, y_object - y_label) < 1e-6:
        return None
    return [(x_object, y_object), (x_label, y_label)]


def _extent(mask: np.ndarray) -> Rect:
    """Return the bounding box of a mask (H, W)."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _bounds(boxes: Any) -> np.ndarray:
    """Return the boxes ``(N, 4)`` next to which labels are drawn.

    For a rotated box, the returned box is its topmost corner, with a width and height of 0.
    """
    boxes = boxes.tensor.numpy()
    if boxes.shape[1] == 4:
        return boxes
    x, y, w, h, angle = boxes.T
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    # Half of the width and height as vectors; the y axis points down.
    right, down = np.stack([w * cos, -w * sin]) / 2, np.stack([h * sin, h * cos]) / 2
    corners = np.stack([-right - down, right - down, right + down, down - right]) + [x, y]
    top = corners[corners[:, 1].argmin(0), :, np.arange(len(boxes))]
    return np.concatenate([top, top], 1)
