"""Linear probe: logistic regression on the features of a frozen backbone."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from senet_transfer.engine.little_data.neighbours import top_errors
from senet_transfer.errors import UserError

# L2 regularisation strengths to try, from strong to weak.
WEIGHT_DECAYS = tuple(float(f"{10**power:.3g}") for power in np.arange(1, -4.5, -0.5))

HELD_OUT = 0.2

# Maximum numbers of L-BFGS iterations: for each strength to try, and for the final fit.
_ITERATIONS_TRIED = 100
_ITERATIONS = 500


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear probe.

    Attributes:
        weight: Weight of a linear layer on the features, float32 ``(C, D)``.
        bias: Bias of this layer, float32 ``(C,)``.
        weight_decay: The selected strength of the regularisation.
        tried: The results on the held-out images, as one dict per regularisation strength with the
            keys ``weight_decay``, ``top1_error`` (in percent) and ``loss`` (mean cross-entropy).
        held_out: The number of held-out images.
    """

    weight: Tensor
    bias: Tensor
    weight_decay: float
    tried: list[dict[str, float]]
    held_out: int


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, *, seed: int = 0
) -> LinearProbe:
    """Fit a linear probe, and select its L2 regularisation strength on held-out training images.

    A fifth of the images in each class is held out. The strength with the lowest top-1 error on
    these images is selected; ties are resolved by the lowest loss. The probe is then fitted to all
    training images. The features are standardised for the fit. The fitted layer is then converted
    so that it applies to the original features.

    Args:
        features: Features of the training images ``(N, D)``.
        labels: Labels of the training images ``(N,)``.
        num_classes: The number of classes.
        seed: The seed for choosing the held-out images.

    Raises:
        UserError: If no class has at least two images.
    """
    values = features.double()
    std, mean = torch.std_mean(values, 0, correction=0)
    std[std == 0] = 1
    values = (values - mean) / std
    out = _held_out(labels, num_classes, seed)
    if not out.any():
        raise UserError(
            "Each class of the training data has at most one image, so none can be held out to "
            "select the regularisation. Use at least two images per class."
        )
    tried = []
    start = None
    for decay in WEIGHT_DECAYS:
        start = logistic_regression(
            values[~out],
            labels[~out],
            num_classes,
            decay,
            start=start,
            iterations=_ITERATIONS_TRIED,
        )
        logits = F.linear(values[out], *start)
        loss = float(F.cross_entropy(logits, labels[out]))
        error = top_errors(logits, labels[out])["top1_error"]
        tried.append({"weight_decay": decay, "top1_error": error, "loss": loss})
    best = min(tried, key=lambda row: (row["top1_error"], row["loss"]))["weight_decay"]
    weight, bias = logistic_regression(values, labels, num_classes, best)
    weight = weight / std
    bias = bias - weight @ mean
    return LinearProbe(weight.float(), bias.float(), best, tried, int(out.sum()))


def logistic_regression(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    weight_decay: float,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    iterations: int = _ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy plus ``weight_decay / 2`` times the sum of squared weights.

    The result is equivalent to scikit-learn's ``LogisticRegression`` with
    ``C = 1 / (N * weight_decay)``. The bias is not regularised. The optimizer is L-BFGS.

    Args:
        features: Features ``(N, D)``, float64.
        labels: Labels ``(N,)``.
        num_classes: The number of classes.
        weight_decay: The strength of the regularisation.
        start: The initial weight and bias. If None, both are initialised with zeros.
        iterations: The maximum number of iterations.

    Returns:
        The weight ``(num_classes, D)`` and the bias ``(num_classes,)``.
    """
    zeros = features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes)
    weight, bias = (value.clone().requires_grad_() for value in start or zeros)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels)
        value = value + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _held_out(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Return a boolean mask ``(N,)`` of the held-out images.

    In each class with two or more images, at least one image is held out and at least one is not.
    """
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        found = (labels == label).nonzero().flatten()
        found = found[torch.randperm(len(found), generator=generator)]
        count = max(round(HELD_OUT * len(found)), 1) if len(found) > 1 else 0
        out[found[:count]] = True
    return out
