"""Tests that compare the focal loss with torchvision, cross-entropy and its definition."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from senet_transfer.layers.focal_loss import softmax_focal_loss

LOGITS = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
SOFT = F.one_hot(LABELS, 5) * 0.7 + F.one_hot(LABELS.flip(0), 5) * 0.3
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_with_two_classes_it_equals_torchvisions_sigmoid_focal_loss(gamma):
    logits, labels = LOGITS[:, :2], LABELS % 2
    difference = logits[:, 1] - logits[:, 0]
    expected = sigmoid_focal_loss(difference, labels.double(), -1, gamma, reduction="mean")
    torch.testing.assert_close(softmax_focal_loss(logits, labels, gamma=gamma), expected)


@pytest.mark.parametrize("target", [LABELS, SOFT], ids=["labels", "probabilities"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["equal", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_gamma_0_it_equals_the_cross_entropy(target, weight, smoothing):
    expected = F.cross_entropy(LOGITS, target, weight, label_smoothing=smoothing)
    options = {"gamma": 0.0, "weight": weight, "label_smoothing": smoothing}
    torch.testing.assert_close(softmax_focal_loss(LOGITS, target, **options), expected)


def test_it_equals_the_weighted_mean_of_lin_et_als_formula():
    p = LOGITS.softmax(1)[torch.arange(6), LABELS]
    each = -WEIGHT[LABELS] * (1 - p) ** 2 * p.log()
    found = softmax_focal_loss(LOGITS, LABELS, gamma=2.0, weight=WEIGHT)
    torch.testing.assert_close(found, each.sum() / WEIGHT[LABELS].sum())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_for_certain_predictions(gamma, dtype):
    logits = torch.tensor([[1000.0, -1000.0], [1000.0, -1000.0]], dtype=dtype, requires_grad=True)
    loss = softmax_focal_loss(logits, torch.tensor([0, 1]), gamma=gamma)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
