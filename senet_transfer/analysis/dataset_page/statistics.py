"""Statistics of annotated objects: histograms, and IoUs with a model's anchors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher

from senet_transfer.analysis.dataset_page.splits import Objects


def shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the percentage of values per bin. The outer bins include values beyond the edges."""
    inner = np.searchsorted(edges[1:-1], values, side="right")
    return 100 * np.bincount(inner, minlength=len(edges) - 1) / max(len(values), 1)


def imbalance(counts: np.ndarray) -> float:
    """Return the class imbalance: the ratio of the largest to the smallest nonzero class count."""
    present = counts[counts > 0]
    return float(present.max() / present.min()) if len(present) else 1.0


def training_scale(cfg: CfgNode, sizes: np.ndarray) -> np.ndarray:
    """Return the resize factors used in training, ``(M, 2)`` for width and height.

    During training, the length of the short side is sampled from ``INPUT.MIN_SIZE_TRAIN``; this
    function uses the median. With ``INPUT.LARGE_SCALE_JITTER``, the jitter factor is assumed to be
    1.

    Args:
        cfg: Config of a detector.
        sizes: Width and height of each image in pixels, ``(M, 2)``.
    """
    jitter = cfg.INPUT.LARGE_SCALE_JITTER
    if jitter.ENABLED:
        return np.repeat((np.array(jitter.SIZE[::-1]) / sizes).min(1, keepdims=True), 2, axis=1)
    short, long = int(np.median(cfg.INPUT.MIN_SIZE_TRAIN)), cfg.INPUT.MAX_SIZE_TRAIN
    if short == 0:
        return np.ones((len(sizes), 2))
    resized = [
        ResizeShortestEdge.get_output_shape(height, width, short, long)
        for width, height in sizes.tolist()
    ]
    return np.array(resized, np.float64).reshape(-1, 2)[:, ::-1] / sizes


@dataclass(frozen=True)
class AnchorFit:
    """Largest IoU of each object with any anchor, in images resized as for training.

    Attributes:
        overlaps: The IoUs, float64 ``(N,)``.
        labels: Label that Detectron2 assigns to an anchor with this IoU: 1 for positive, 0 for
            negative and -1 for ignored anchors, int ``(N,)``.
        thresholds: The config's IoU thresholds.
        border: Number of pixels that an anchor may extend beyond the image
            (``MODEL.RPN.BOUNDARY_THRESH``). If negative, there is no limit.
    """

    overlaps: np.ndarray
    labels: np.ndarray
    thresholds: Sequence[float]
    border: float


def anchor_fit(cfg: CfgNode, objects: Objects) -> AnchorFit | None:
    """Return the largest IoU of each object with any anchor of the model.

    Return None if the model has no axis-aligned anchors.
    """
    single = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    if cfg.MODEL.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator" or not (
        single or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN"
    ):
        return None
    head = cfg.MODEL.RETINANET if single else cfg.MODEL.RPN
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.NORM = "BN"  # avoid a warning about FrozenBN without weights
    with torch.device("meta"):
        backbone = build_backbone(plain)
    shapes = [backbone.output_shape()[name] for name in head.IN_FEATURES]
    scale = training_scale(cfg, objects.sizes)
    border = -1 if single else cfg.MODEL.RPN.BOUNDARY_THRESH
    overlaps = best_overlaps(
        objects.boxes * np.tile(scale[objects.images], 2),
        np.rint(objects.sizes * scale)[objects.images],
        build_anchor_generator(plain, shapes),
        divisor=max(backbone.size_divisibility, 1),
        border=border,
    )
    matcher = Matcher(head.IOU_THRESHOLDS, head.IOU_LABELS, allow_low_quality_matches=False)
    labels = matcher(torch.from_numpy(overlaps)[None])[1].numpy()
    return AnchorFit(overlaps, labels, list(head.IOU_THRESHOLDS), border)


def best_overlaps(
    boxes: np.ndarray,
    sizes: np.ndarray,
    generator: DefaultAnchorGenerator,
    *,
    divisor: int = 1,
    border: float = -1,
) -> np.ndarray:
    """Return the largest IoU of each box with any anchor.

    All anchors with the same shape lie on a grid, and the IoU of two boxes with fixed sizes
    decreases with the distance between their centres in each direction. Therefore, it is enough to
    compare each box with the nearest anchor of each shape.

    Args:
        boxes: Left, top, right and bottom in pixels, ``(N, 4)``.
        sizes: Width and height of each box's image in pixels, ``(N, 2)``.
        generator: Detectron2's anchor generator.
        divisor: The sides of the padded image are multiples of this number.
        border: See :class:`AnchorFit`.

    Returns:
        The IoUs, float64 ``(N,)``; 0 if ``border`` excludes all anchors of the image.
    """
    best = np.zeros(len(boxes))
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    padded = np.ceil(sizes / divisor) * divisor
    for stride, cells in zip(generator.strides, generator.cell_anchors, strict=True):
        for cell in cells.double().numpy() + generator.offset * stride:
            first, last = np.zeros_like(padded), np.ceil(padded / stride) - 1
            if border >= 0:
                first = np.maximum(first, np.ceil((-border - cell[:2]) / stride))
                last = np.minimum(last, np.ceil((sizes + border - cell[2:]) / stride) - 1)
            middle = (cell[:2] + cell[2:]) / 2
            step = np.clip(np.rint((centres - middle) / stride), first, last)
            low, high = cell[:2] + step * stride, cell[2:] + step * stride
            overlap = np.minimum(high, boxes[:, 2:]) - np.maximum(low, boxes[:, :2])
            common = overlap.clip(0).prod(1)
            union = sides.prod(1) + (cell[2:] - cell[:2]).prod() - common
            permitted = (first <= last).all(1)
            best = np.maximum(best, np.where(permitted, common / union, 0))
    return best
