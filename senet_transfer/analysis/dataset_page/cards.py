"""Image cards for a dataset's HTML page: training inputs, unusual annotations and duplicates."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from senet_transfer.analysis.dataset_page.inputs import View
from senet_transfer.analysis.dataset_page.splits import Split
from senet_transfer.analysis.dataset_page.unusual import Unusual
from senet_transfer.analysis.report.pictures import data_uri
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.channels import as_rgb, decode_shown
from senet_transfer.data.images.decode import Reading

# Maximum length of an image's longer side in pixels.
SIDE, THUMBNAIL = 640, 160
# Maximum number of images shown per group of duplicates.
MOST_MEMBERS = 6
# Side of a crop, as a multiple of the object's longer side, and its minimum in pixels.
_CONTEXT, _LEAST_CROP = 2.5, 48
# Minimum length of an image's longer side in units of the SVG drawing.
_LEAST_PICTURE = 320


def input_card(views: Sequence[View], classes: Sequence[str], *, detection: bool) -> dict[str, Any]:
    """Return an image card for the HTML page: a training input with and without augmentation."""
    panels = []
    for view, text in zip(views, ("training input", "without augmentation"), strict=True):
        height, width = view.pixels.shape[:2]
        panels.append(_view_picture(view) | {"caption": f"{text}, {width} x {height} pixels"})
    name = views[0].name.rpartition("/")[2]
    label = "" if detection else classes[views[0].classes[0]]
    return {"name": " · ".join(filter(None, (name, label))), "panels": panels}


def _view_picture(view: View) -> dict[str, Any]:
    source, (width, height) = data_uri(view.pixels, SIDE)
    scale = width / view.pixels.shape[1]
    boxes = [[*_rect(box * scale), k] for box, k in zip(view.boxes, view.classes, strict=False)]
    outlines = [
        [" ".join(f"{x:.1f},{y:.1f}" for x, y in points * scale), view.classes[index]]
        for index, points in view.outlines
    ]
    return {
        "name": view.name.rpartition("/")[2], "src": source, "width": width, "height": height,
        "boxes": boxes, "outlines": outlines,
    }  # fmt: skip


def unusual_card(split: Split, item: Unusual, reading: Reading) -> dict[str, Any]:
    """Return an image card for the HTML page: an unusual annotation or an unusual image.

    For an annotation, the card shows a crop of the image around the annotation.

    Args:
        split: The dataset that contains the image.
        item: The unusual annotation or image.
        reading: Settings for reading images.

    Raises:
        Exception: Any exception that a decoder raises for a corrupted file.
    """
    name = split.name_of(item.image)
    if split.files:
        pixels = as_rgb(read_image(split.files[item.image], "RGB", reading))
    else:
        pixels = decode_shown(split.images.read_sample(item.image).data, reading)
    boxes, classes = np.zeros((0, 4)), np.zeros(0, np.int64)
    flagged = np.zeros(0, bool)
    if split.objects is not None:
        indices = np.flatnonzero(split.objects.images == item.image)
        boxes, classes = split.objects.boxes[indices], split.objects.classes[indices]
        flagged = np.isin(indices, item.objects)
    left, top, right, bottom = crop_around(boxes[flagged], pixels.shape[1], pixels.shape[0])
    source, (width, height) = data_uri(pixels[top:bottom, left:right], SIDE)
    # Lines and labels are drawn in the image's units, so the image must not be tiny.
    enlarged = max(1.0, _LEAST_PICTURE / max(width, height))
    width, height = round(width * enlarged), round(height * enlarged)
    moved = (boxes - (left, top, left, top)) * (width / (right - left))
    clipped = moved.clip(0, (width, height, width, height))
    visible = (clipped[:, 2:] > clipped[:, :2]).all(1) | flagged
    # Draw the flagged boxes last, on top of the others.
    order = [k for k in np.argsort(flagged, kind="stable") if visible[k]]
    size = f"{right - left} x {bottom - top} pixels"
    return {
        "name": f"{split.role}: {name}",
        "why": item.why,
        "picture": {
            "name": name, "src": source, "width": width, "height": height, "outlines": [],
            "caption": f"crop of {size}" if item.objects else f"whole image, {size}",
            "boxes": [[*_rect(clipped[k]), int(classes[k]), bool(flagged[k])] for k in order],
        },
    }  # fmt: skip


def crop_around(boxes: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom edges of a square crop around the boxes.

    The crop is clipped to the image. If there are no boxes, it is the whole image.

    Args:
        boxes: Left, top, right and bottom in pixels, ``(N, 4)``.
        width: Width of the image.
        height: Height of the image.
    """
    if not len(boxes):
        return 0, 0, width, height
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = max(_CONTEXT * (high - low).max(), _LEAST_CROP)
    x, y = ((low + high) / 2).clip(0, (width, height))  # The centre may be outside the image.
    return (
        max(0, math.floor(x - side / 2)),
        max(0, math.floor(y - side / 2)),
        min(width, math.ceil(x + side / 2)),
        min(height, math.ceil(y + side / 2)),
    )


def duplicates_card(
    members: Sequence[tuple[Split, int]], *, identical: bool, reading: Reading
) -> dict[str, Any]:
    """Return an image card for the HTML page: thumbnails of duplicates or near-duplicates.

    Args:
        members: Dataset and index of each image.
        identical: True if the files are identical.
        reading: Settings for reading images.
    """
    pictures = []
    for split, index in members[:MOST_MEMBERS]:
        sample = split.images.read_sample(index)
        pixels = decode_shown(sample.data, reading, THUMBNAIL)
        label = "" if split.files else f" ({split.classes[sample.label]})"
        pictures.append({
            "name": f"{split.role}: {split.name_of(index)}{label}",
            "src": data_uri(pixels, THUMBNAIL)[0],
        })  # fmt: skip
    kind = "identical files" if identical else "almost identical images"
    hidden = len(members) - len(pictures)
    more = f", of which {len(pictures)} are shown" if hidden else ""
    return {"kind": f"{len(members)} {kind}{more}", "members": pictures}


def _rect(box: np.ndarray) -> list[float]:
    """Return the rounded left, top, width and height of a box."""
    return [round(float(v), 1) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])]
