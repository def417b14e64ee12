"""Weighted nearest-neighbour classification of features, as in DINO (Caron et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from senet_transfer.evaluation.classification_evaluator import TOP

# Temperature of the weights, as in DINO.
TEMPERATURE = 0.07

_CHUNK = 1024


def neighbour_scores(
    train: Tensor, labels: Tensor, features: Tensor, *, k: int, num_classes: int
) -> Tensor:
    """Return class scores for each image, computed from its ``k`` nearest training images.

    The nearest images are those whose features have the largest cosine similarity ``s``. Each of
    them adds the weight ``exp(s / 0.07)`` to the score of its class.

    Args:
        train: Features of the training images ``(M, D)``.
        labels: Labels of the training images ``(M,)``.
        features: Features of the images to classify ``(N, D)``.
        k: Number of neighbours. If there are fewer training images, all of them are used.
        num_classes: Number of classes.

    Returns:
        Scores ``(N, num_classes)``. The score is 0 for a class with no image among the neighbours.
    """
    known = F.normalize(train.double()).T
    scores = []
    for part in features.double().split(_CHUNK):
        similarity, found = (F.normalize(part) @ known).topk(min(k, len(train)))
        votes = torch.zeros(len(part), num_classes, dtype=torch.float64)
        scores.append(votes.scatter_add_(1, labels[found], (similarity / TEMPERATURE).exp()))
    return torch.cat(scores)


def top_errors(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the number of images and the top-1 and top-5 errors in percent.

    Args:
        scores: Class scores ``(N, C)``. Classes with a score of minus infinity never count as
            top-5 predictions, even if fewer than five classes have finite scores.
        labels: Class indices ``(N,)``.
    """
    values, best = scores.topk(min(TOP, scores.shape[1]))
    hits = (best == labels[:, None]) & (values > -torch.inf)
    images, top1, top5 = len(labels), int(hits[:, 0].sum()), int(hits.sum())
    errors = [100 * (images - right) / images for right in (top1, top5)]
    return {"images": images, "top1_error": errors[0], "top5_error": errors[1]}
