"""Statistics of gate values within and between classes, accumulated batch by batch."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SATURATED = 0.95
CLOSED = 0.05


@dataclass
class _Sums:
    """Running sums of the gate values of one class, as arrays of shape ``(C,)``."""

    images: int
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> "_Sums":
        return cls(0, np.zeros(channels), np.zeros(channels))

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.images

    @property
    def scatter(self) -> np.ndarray:
        """Sum of squared deviations from the mean."""
        # The values are of order 1 and the sums have double precision, so cancellation is small.
        return np.maximum(self.squares - self.images * self.mean**2, 0)


@dataclass(frozen=True)
class ClassGates:
    """Statistics of a gate over the images of one class.

    Attributes:
        images: Number of images.
        mean: Mean of each channel over the images, ``(C,)``.
        std: Standard deviation of each channel over the images, ``(C,)``.
    """

    images: int
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Summary:
    """Summary statistics of a block's gate. Standard deviations are pooled over channels.

    Attributes:
        channels: Number of channels.
        mean: Mean of all values.
        saturated: Fraction of values above 0.95.
        closed: Fraction of values below 0.05.
        between: Standard deviation of the class means, corrected for the finite number of images
            per class.
        within: Standard deviation between images of the same class.
    """

    channels: int
    mean: float
    saturated: float
    closed: float
    between: float
    within: float

    @property
    def specificity(self) -> float:
        """Ratio of the between-class to the within-class standard deviation."""
        return self.between / self.within if self.within else 0.0

    @property
    def verdict(self) -> str:
        """Reason why the gate has little effect on the network.

        ``"open"`` if most values are close to 1, ``"constant"`` if the values hardly vary, or
        ``""`` for other gates.
        """
        if self.saturated >= 0.9:
            return "open"
        # If a gate has the same value for all images, it can be folded into a norm or convolution.
        return "constant" if np.hypot(self.between, self.within) < 0.01 else ""


class GateStatistics:
    """Statistics of one block's gate, accumulated from batches in any order.

    Once all images of a class have been processed, the class's sums are merged into the totals over
    all classes. If the images are sorted by class, memory use therefore doesn't grow with the
    number of classes. Means and standard deviations per class are kept only for the classes to
    plot.

    Attributes:
        kept: Statistics of each class to plot, keyed by label. A class is added when all its images
            have been processed.
    """

    def __init__(self, counts: np.ndarray, keep: Iterable[int] = ()):
        """
        Args:
            counts: The number of images per class, ``(K,)``.
            keep: The labels of the classes to plot.
        """
        self.counts = counts
        self.keep = set(keep)
        self.kept: dict[int, ClassGates] = {}
        self._open: dict[int, _Sums] = {}
        self._classes = self._images = self._squared_images = 0
        self._values = self._saturated = self._closed = 0

    def update(self, labels: np.ndarray, gates: np.ndarray) -> None:
        """Add the gate values ``(N, C)`` of a batch with labels ``(N,)``."""
        gates = gates.astype(np.float64)
        if not self._values:
            self._mean_of_classes, self._mean, self._between, self._within = (
                np.zeros(gates.shape[1]) for _ in range(4)
            )
        self._values += gates.size
        self._saturated += int((gates > SATURATED).sum())
        self._closed += int((gates < CLOSED).sum())
        for label in np.unique(labels).tolist():
            rows = gates[labels == label]
            sums = self._open.setdefault(label, _Sums.empty(gates.shape[1]))
            sums.images += len(rows)
            sums.total += rows.sum(0)
            sums.squares += (rows**2).sum(0)
            if sums.images == self.counts[label]:
                self._fold(label, self._open.pop(label))

    def _fold(self, label: int, sums: _Sums) -> None:
        if label in self.keep:
            std = np.sqrt(sums.scatter / max(sums.images - 1, 1))
            self.kept[label] = ClassGates(sums.images, sums.mean, std)
        self._within += sums.scatter
        self._images += sums.images
        self._squared_images += sums.images**2
        # Update the weighted scatter of the means with West's algorithm.
        distance = sums.mean - self._mean
        self._mean += distance * sums.images / self._images
        self._between += sums.images * distance * (sums.mean - self._mean)
        self._classes += 1
        self._mean_of_classes += (sums.mean - self._mean_of_classes) / self._classes

    @property
    def mean_of_classes(self) -> np.ndarray:
        """Average of the classes' mean gate values, one value per channel, ``(C,)``.

        Classes without images are excluded.
        """
        return self._mean_of_classes

    def summary(self) -> Summary:
        """Return the summary statistics of all values.

        The between-class and within-class standard deviations are estimated by a one-way analysis
        of variance with random effects. The former is 0 if there is only one class, and the latter
        is 0 if there is only one image per class.
        """
        classes, images = self._classes, self._images
        within = self._within / (images - classes) if images > classes else 0 * self._within
        between = 0 * within
        if classes > 1:
            per_class = (images - self._squared_images / images) / (classes - 1)
            between = (self._between / (classes - 1) - within) / per_class
        return Summary(
            channels=len(within),
            mean=float(self._mean.mean()),
            saturated=self._saturated / self._values,
            closed=self._closed / self._values,
            # Pool over channels before taking the root: for a channel that doesn't differ between
            # classes, the estimated variance is negative as often as positive.
            between=float(np.sqrt(max(between.mean(), 0))),
            within=float(np.sqrt(within.mean())),
        )
