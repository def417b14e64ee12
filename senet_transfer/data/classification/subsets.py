"""Seeded random subsets of classification datasets and other sequences."""

from collections.abc import Sequence

import numpy as np

from senet_transfer.data.base import ClassificationDataset, RawSample, SingleImages


class ClassSample(SingleImages):
    """Random subset with a limited number of images per class, ordered by class."""

    def __init__(self, dataset: ClassificationDataset, images_per_class: int, *, seed: int = 0):
        """
        Args:
            dataset: Dataset to sample from, uniformly and without replacement.
            images_per_class: Number of images per class. If a class has fewer images, all of them
                are used.
            seed: Random seed. The images chosen for a class depend only on the seed and the class.
        """
        labels = dataset.labels()
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(dataset.num_classes + 1))
        chosen: list[int] = []
        for label, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            random = np.random.default_rng([seed, label])
            drawn = random.permutation(end - first)[:images_per_class]
            chosen += sorted(order[first:end][drawn].tolist())
        super().__init__(dataset.classes, len(chosen), dataset.origin)
        self.dataset = dataset
        self.chosen = chosen
        self._labels = labels[chosen]

    @property
    def counts(self) -> np.ndarray:
        """Number of images per class, `(C,)`."""
        return np.bincount(self._labels, minlength=self.num_classes)

    def labels(self) -> np.ndarray:
        return self._labels

    def read_sample(self, index: int) -> RawSample:
        return self.dataset.read_sample(self.chosen[index])


def draw(items: Sequence, count: int, *, seed: int = 0) -> list:
    """Return up to `count` randomly chosen items in their original order."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[index] for index in sorted(chosen.tolist())]
