"""Weighted boxes fusion (Solovyev et al. 2021), which merges the boxes of several detectors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou


def fuse_boxes(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    classes: Sequence[Tensor],
    iou_threshold: float = 0.55,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge overlapping boxes of the same class into their mean, weighted by score.

    The result is the same as with ``weighted_boxes_fusion`` in the package ensemble-boxes with
    equal weights and ``conf_type="avg"``. The score of a merged box is the mean score of its boxes,
    multiplied by ``min(B, D) / D`` for B merged boxes and D detectors.

    Args:
        boxes: Boxes ``(N, 4)`` of each detector, as (x0, y0, x1, y1).
        scores: Scores ``(N,)`` of each detector.
        classes: Class indices ``(N,)`` of each detector.
        iou_threshold: A box is added to a merged box if their IoU is above this threshold.

    Returns:
        The merged boxes, scores and classes, in descending order of the scores.
    """
    found = torch.cat([one.double() for one in boxes])
    weights, labels = torch.cat([one.double() for one in scores]), torch.cat(list(classes))
    merged, merged_scores, merged_classes = [], [], []
    for label in labels.unique():
        chosen = (labels == label).nonzero()[:, 0]
        chosen = chosen[weights[chosen].argsort(descending=True, stable=True)]
        fused, fused_scores = _fuse_class(found[chosen], weights[chosen], iou_threshold, len(boxes))
        merged.append(fused)
        merged_scores.append(fused_scores)
        merged_classes.append(label.expand(len(fused)))
    if not merged:
        return boxes[0][:0], scores[0][:0], classes[0][:0]
    all_scores = torch.cat(merged_scores)
    order = all_scores.argsort(descending=True, stable=True)
    return (
        torch.cat(merged)[order].to(boxes[0].dtype),
        all_scores[order].to(scores[0].dtype),
        torch.cat(merged_classes)[order],
    )


def _fuse_class(
    boxes: Tensor, scores: Tensor, iou_threshold: float, detectors: int
) -> tuple[Tensor, Tensor]:
    """Merge the boxes ``(N, 4)`` of one class, which are sorted by descending score."""
    fused, sums = torch.empty_like(boxes), torch.empty_like(scores)
    members = torch.zeros_like(scores)
    count = 0
    for box, score in zip(boxes, scores, strict=True):
        iou, index = box_iou(box[None], fused[:count])[0].max(0) if count else (-1.0, 0)
        if iou > iou_threshold:
            fused[index] = (fused[index] * sums[index] + box * score) / (sums[index] + score)
            sums[index] += score
        else:
            index, count = count, count + 1
            fused[index], sums[index] = box, score
        members[index] += 1
    fused, sums, members = fused[:count], sums[:count], members[:count]
    return fused, sums / members * members.clamp(max=detectors) / detectors
