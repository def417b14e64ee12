"""PyTorch operators for rotated boxes, for Detectron2 builds without compiled operators.

Detectron2 implements these operators in C++ and CUDA. If its compiled extension is missing, for
example because it can't be built, heads for rotated boxes raise an error as soon as they run. The
operators in this module have the same names, arguments and results, but are slower and use more
memory.

A rotated box consists of five values: the x and y coordinates of the centre, the width, the height,
and the counterclockwise angle in degrees.
"""

import importlib
import math

import torch
from torch import Tensor

_NAMESPACE = "detectron2"
# Maximum number of box pairs and of regions that are processed at a time.
_PAIRS, _REGIONS = 2**16, 64
# Maximum number of boxes that non-maximum suppression processes at a time.
_BLOCK = 64
# Boxes with a smaller area have an IoU of 0, as in Detectron2.
_LEAST_AREA = 1e-14

_SCHEMAS = {
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
    "nms_rotated": "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align_rotated_forward": (
        "(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
        "int sampling_ratio) -> Tensor"
    ),
    "roi_align_rotated_backward": (
        "(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
        "int batch_size, int channels, int height, int width, int sampling_ratio) -> Tensor"
    ),
}


def define_missing_operators() -> list[str]:
    """Register operators that the installed Detectron2 build lacks, and return their names.

    Repeated calls have no effect.
    """
    # Detectron2 loads its compiled operators when this module is imported.
    importlib.import_module("detectron2.layers")
    functions = {
        "box_iou_rotated": box_iou_rotated,
        "nms_rotated": nms_rotated,
        "roi_align_rotated_forward": roi_align_rotated,
        "roi_align_rotated_backward": roi_align_rotated_backward,
    }
    missing = [name for name in functions if not hasattr(torch.ops.detectron2, name)]
    for name in missing:
        torch.library.define(f"{_NAMESPACE}::{name}", _SCHEMAS[name])
        torch.library.impl(f"{_NAMESPACE}::{name}", ("cpu", "cuda"), functions[name])
    return missing


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the IoU (N, M) of each pair of rotated boxes (N, 5) and (M, 5)."""
    ious = torch.zeros(len(boxes1), len(boxes2), dtype=torch.float32, device=boxes1.device)
    step = max(_PAIRS // max(len(boxes2), 1), 1)
    for start in range(0, len(boxes1), step):
        part = boxes1[start : start + step]
        rows, columns = _near(part, boxes2).nonzero(as_tuple=True)
        ious[start + rows, columns] = _pair_ious(part[rows], boxes2[columns]).float()
    return ious


def _near(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return a mask (N, M) of the pairs of rotated boxes that are close enough to overlap."""
    distance = torch.cdist(boxes1[:, :2].double(), boxes2[:, :2].double())
    radius1, radius2 = (boxes[:, 2:4].double().norm(dim=1) / 2 for boxes in (boxes1, boxes2))
    return distance < radius1[:, None] + radius2


def _pair_ious(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the IoUs ``(P,)`` of pairs of rotated boxes ``(P, 5)``."""
    # Use coordinates relative to the first box, because differences of large coordinates are
    # inexact.
    origin = boxes1[:, None, :2].double()
    corners1, corners2 = _corners(boxes1) - origin, _corners(boxes2) - origin
    area1, area2 = (boxes[:, 2:4].double().prod(1) for boxes in (boxes1, boxes2))
    common = _intersection(corners1, corners2)
    union = area1 + area2 - common
    valid = (area1 >= _LEAST_AREA) & (area2 >= _LEAST_AREA)
    return torch.where(valid, common / union.clamp(min=_LEAST_AREA), 0.0)


def _corners(boxes: Tensor) -> Tensor:
    """Return the corners (P, 4, 2) of rotated boxes (P, 5), in order around the box."""
    x, y, w, h, angle = boxes.double().unbind(1)
    cos, sin = torch.cos(angle.deg2rad()), torch.sin(angle.deg2rad())
    # The y axis points down, so a counterclockwise rotation has the opposite sign.
    right = torch.stack([cos * w, -sin * w], 1) / 2
    down = torch.stack([sin * h, cos * h], 1) / 2
    centre = torch.stack([x, y], 1)
    return (
        torch.stack([-right - down, right - down, right + down, down - right], 1) + centre[:, None]
    )


def _intersection(corners1: Tensor, corners2: Tensor) -> Tensor:
    """Return the intersection areas (P,) of pairs of rectangles (P, 4, 2).

    The intersection is a convex polygon. Its corners are the corners of each rectangle that are
    inside the other rectangle, and the intersections of the rectangles' edges.
    """
    crossings, crosses = _edge_crossings(corners1, corners2)
    points = torch.cat([corners1, corners2, crossings], 1)
    valid = torch.cat([_inside(corners1, corners2), _inside(corners2, corners1), crosses], 1)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    centre = (points * valid[..., None]).sum(1, keepdim=True) / count[..., None]
    offset = points - centre
    angle = torch.atan2(offset[..., 1], offset[..., 0]).masked_fill(~valid, math.inf)
    order = angle.argsort(1)
    offset = offset.gather(1, order[..., None].expand_as(offset))
    # Replace the unused points at the end with the first point, which adds no area.
    used = torch.arange(points.shape[1], device=points.device) < valid.sum(1, keepdim=True)
    offset = torch.where(used[..., None], offset, offset[:, :1])
    x, y = offset.unbind(2)
    area = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2
    return torch.where(valid.sum(1) > 2, area.abs(), 0.0)


def _inside(points: Tensor, corners: Tensor) -> Tensor:
    """Return a mask (P, K) of the points (P, K, 2) inside the rectangles (P, 4, 2)."""
    origin = corners[:, :1]
    inside = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    for edge in (corners[:, 1:2] - origin, corners[:, 3:4] - origin):
        along, length = ((points - origin) * edge).sum(2), (edge * edge).sum(2)
        tolerance = 1e-9 * length
        inside &= (along >= -tolerance) & (along <= length + tolerance)
    return inside


def _edge_crossings(corners1: Tensor, corners2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intersections of the edges of P pairs of rectangles, and a mask of valid points.

    The intersections have the shape (P, 16, 2). The mask, with the shape (P, 16), is False for
    pairs of edges that do not intersect.
    """
    start1, start2 = corners1[:, :, None], corners2[:, None]
    edge1 = corners1.roll(-1, 1)[:, :, None] - start1
    edge2 = corners2.roll(-1, 1)[:, None] - start2
    between = start2 - start1
    determinant = _cross(edge1, edge2)
    parallel = determinant.abs() < _LEAST_AREA
    determinant = determinant.masked_fill(parallel, 1.0)
    along1, along2 = _cross(between, edge2) / determinant, _cross(between, edge1) / determinant
    exist = ~parallel & (along1 >= 0) & (along1 <= 1) & (along2 >= 0) & (along2 <= 1)
    points = start1 + along1[..., None] * edge1
    return points.flatten(1, 2), exist.flatten(1, 2)


def _cross(first: Tensor, second: Tensor) -> Tensor:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes kept by non-maximum suppression, in descending score order.

    Args:
        boxes: Rotated boxes (N, 5).
        scores: Scores of the boxes, (N,).
        iou_threshold: A box is suppressed if its IoU with a kept box is at least this value.
    """
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[:_BLOCK], left[_BLOCK:]
        overlapping = _overlapping(boxes[best], boxes[best], iou_threshold).tolist()
        chosen: list[int] = []
        for index, row in enumerate(overlapping):
            if not any(row[other] for other in chosen):
                chosen.append(index)
        kept.append(best[chosen])
        left = left[~_overlapping(boxes[best[chosen]], boxes[left], iou_threshold).any(0)]
    return torch.cat(kept) if kept else left


def _overlapping(boxes1: Tensor, boxes2: Tensor, threshold: float) -> Tensor:
    """Return a mask (N, M) of the pairs of rotated boxes with an IoU of at least ``threshold``."""
    area1, area2 = boxes1[:, 2:4].prod(1)[:, None], boxes2[:, 2:4].prod(1)
    # The IoU is at most the ratio of the areas.
    possible = torch.minimum(area1, area2) >= 0.999 * threshold * torch.maximum(area1, area2)
    rows, columns = (possible & _near(boxes1, boxes2)).nonzero(as_tuple=True)
    result = torch.zeros(len(boxes1), len(boxes2), dtype=torch.bool, device=boxes1.device)
    for part in torch.arange(len(rows), device=rows.device).split(_PAIRS):
        ious = _pair_ious(boxes1[rows[part]], boxes2[columns[part]])
        result[rows[part], columns[part]] = ious >= threshold
    return result


def roi_align_rotated(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
) -> Tensor:
    """Return the features (K, C, pooled_height, pooled_width) of rotated regions of interest.

    Args:
        input: Feature maps (N, C, H, W).
        rois: Regions of interest (K, 6): the index of the image in the batch, and a rotated box.
        spatial_scale: Factor that converts box coordinates to feature map coordinates.
        pooled_height: The number of rows of the output.
        pooled_width: The number of columns of the output.
        sampling_ratio: The number of samples per output bin in each direction. If 0, the number is
            chosen per region, so that samples are at most one feature map pixel apart.
    """
    sides = rois[:, [4, 3]].detach() * spatial_scale  # height and width
    pooled = sides.new_tensor([pooled_height, pooled_width])
    if sampling_ratio > 0:
        grids = torch.full_like(sides, sampling_ratio).long()
    else:
        grids = (sides / pooled).ceil().long()
    output = input.new_zeros(len(rois), input.shape[1], pooled_height, pooled_width)
    for grid in grids.unique(dim=0).tolist():
        # An empty region has no samples, and its features are 0.
        chosen = (grids == grids.new_tensor(grid)).all(1).nonzero().flatten()
        for part in chosen.split(_REGIONS) if min(grid) > 0 else ():
            bins = (pooled_height, pooled_width)
            values = _align(input, rois[part], spatial_scale, bins, (grid[0], grid[1]))
            output = output.index_put((part,), values)
    return output


def _align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    bins: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    _, x, y, w, h, angle = rois.unbind(1)
    # Pixel 0 has its centre at the coordinate 0.5.
    centre_x, centre_y = x * spatial_scale - 0.5, y * spatial_scale - 0.5
    cos, sin = (f(angle.deg2rad())[:, None, None] for f in (torch.cos, torch.sin))
    steps = [
        (torch.arange(count * samples).to(rois) + 0.5) / (count * samples) - 0.5
        for count, samples in zip(bins, grid, strict=True)
    ]
    down = steps[0][None, :, None] * (h * spatial_scale)[:, None, None]
    right = steps[1][None, None, :] * (w * spatial_scale)[:, None, None]
    rows = down * cos - right * sin + centre_y[:, None, None]
    columns = down * sin + right * cos + centre_x[:, None, None]
    samples = _bilinear(input, rois[:, 0].long(), rows, columns)
    return torch.nn.functional.avg_pool2d(samples, grid)


def _bilinear(input: Tensor, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Interpolate features bilinearly at a grid of R x S positions per region.

    The features are 0 at positions that are more than one pixel outside the feature map.

    Args:
        input: Feature maps (N, C, H, W).
        images: The index of each region's image in the batch (K,).
        rows: The row coordinate of each position (K, R, S).
        columns: The column coordinate of each position (K, R, S).

    Returns:
        The interpolated features (K, C, R, S).
    """
    _, channels, height, width = input.shape
    outside = (rows < -1) | (rows > height) | (columns < -1) | (columns > width)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    top, left = rows.floor().long(), columns.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    below, beyond = rows - top, columns - left
    flat = input.transpose(0, 1).reshape(channels, -1)
    first = (images * height * width)[:, None, None]

    def at(row: Tensor, column: Tensor, weight: Tensor) -> Tensor:
        weight = weight.masked_fill(outside, 0.0).to(flat.dtype)
        return flat[:, first + row * width + column] * weight

    values = at(top, left, (1 - below) * (1 - beyond)) + at(top, right, (1 - below) * beyond)
    values = values + at(bottom, left, below * (1 - beyond)) + at(bottom, right, below * beyond)
    return values.transpose(0, 1)


def roi_align_rotated_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
) -> Tensor:
    """Return the gradient (N, C, H, W) with respect to the input of :func:`roi_align_rotated`."""
    with torch.enable_grad():
        # The output is linear in the input, so its gradient does not depend on the input values.
        input = grad.new_zeros(batch_size, channels, height, width, requires_grad=True)
        output = roi_align_rotated(
            input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio
        )
        if not output.requires_grad:
            return torch.zeros_like(input)
        return torch.autograd.grad(output, input, grad)[0]
