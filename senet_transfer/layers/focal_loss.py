"""Focal loss of a softmax classifier (Lin et al. 2017, "Focal loss for dense object detection").

Lin et al. define the loss for one sigmoid per class. This module implements its softmax form,

    -sum_c t_c w_c (1 - p_c)^gamma log(p_c),

for a target distribution t and class weights w. For a hard label y, the loss is

    -w_y (1 - p_y)^gamma log(p_y).

With gamma 0, it is the cross-entropy. With two classes, it equals the sigmoid form for the
difference of the logits.
"""

import torch
from torch import Tensor


def softmax_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean focal loss of a batch.

    Class weights, label smoothing and the mean reduction work as in
    `torch.nn.functional.cross_entropy`: with class indices as targets, the mean is weighted by the
    weights of the target classes.

    Args:
        logits: Logits `(N, C)`. The loss is computed in float32, or in the precision of the logits
            if it is higher.
        target: Class indices `(N,)`, int64, or class probabilities `(N, C)`.
        gamma: Focusing parameter. A larger value down-weights well-classified images more strongly.
        weight: Weight of each class, `(C,)`; None for equal weights.
        label_smoothing: Label smoothing, in [0, 1).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log = logits.log_softmax(1)
    total: Tensor | int = len(logits)
    if target.dim() == 1:
        if weight is not None:
            total = weight[target].sum()
        target = torch.zeros_like(log).scatter_(1, target[:, None], 1.0)
    target = target.to(log.dtype) * (1 - label_smoothing) + label_smoothing / log.shape[1]
    if weight is not None:
        target = target * weight
    # The minimum keeps the gradient finite at a probability of 1 for gamma below 1.
    rest = (-log.expm1()).clamp_min(torch.finfo(log.dtype).eps)
    return -(target * rest**gamma * log).sum() / total
