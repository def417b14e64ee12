"""Some images of each class, drawn at random and always the same."""

from collections.abc import Sequence

import numpy as np

from senet_transfer.data.base import ClassificationDataset, RawSample, SingleImages


class ClassSample(SingleImages):
    """Up to so many images of each class, ordered by class."""

    def __init__(self, dataset: ClassificationDataset, images_per_class: int, *, seed: int = 0):
        """
        Args:
            dataset: to draw from, uniformly and without replacement.
            images_per_class: a class that has fewer gives all it has.
            seed: what is drawn of a class follows from it and from the class alone.
        """
        labels = dataset.labels()
        order = np.argsort(labels, kind="stable")
        places = np.searchsorted(labels[order], np.arange(dataset.num_classes + 1))
        chosen: list[int] = []
        for label, (first, end) in enumerate(zip(places, places[1:], strict=False)):
            random = np.random.default_rng([seed, label])
            drawn = random.permutation(end - first)[:images_per_class]
            chosen += sorted(order[first:end][drawn].tolist())
        super().__init__(dataset.classes, len(chosen), dataset.origin)
        self.dataset = dataset
        self.chosen = chosen
        self._labels = labels[chosen]

    @property
    def counts(self) -> np.ndarray:
        """How many images each class gives, `(C,)`."""
        return np.bincount(self._labels, minlength=self.num_classes)

    def labels(self) -> np.ndarray:
        return self._labels

    def read_sample(self, index: int) -> RawSample:
        return self.dataset.read_sample(self.chosen[index])


def draw(items: Sequence, count: int, *, seed: int = 0) -> list:
    """So many of the items, or all where there are fewer, in their order; always the same."""
    places = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[place] for place in sorted(places.tolist())]
