"""Averaging of the probabilities predicted by several classifiers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from senet_transfer.models.dense import DenseClassifier
from senet_transfer.models.image_classifier import ImageClassifier


def average_logits(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the probabilities averaged over several classifiers.

    Args:
        logits: Logits ``(N, C)`` of each classifier.

    Returns:
        Float64 ``(N, C)``. Its softmax is the mean of the classifiers' softmax outputs.
    """
    single = torch.stack([found.double().log_softmax(1) for found in logits])
    return single.logsumexp(0) - math.log(len(logits))


class AveragedClassifier(nn.Module):
    """Ensemble of classifiers that averages their probabilities."""

    def __init__(self, models: Sequence[ImageClassifier | DenseClassifier]):
        """
        Args:
            models: Classifiers with the same classes, on the same device.
        """
        super().__init__()
        self.models = nn.ModuleList(models)

    @property
    def device(self) -> torch.device:
        """Return the device of the models."""
        return self.models[0].device

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self.models[0].num_classes

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the logarithm of the averaged probabilities, ``(N, num_classes)``."""
        return average_logits([model(batch) for model in self.models])
