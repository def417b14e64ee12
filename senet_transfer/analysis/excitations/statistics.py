"""Statistics of a gate's values over classes, in memory that does not grow with the data."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SATURATED = 0.95
CLOSED = 0.05


@dataclass
class _Sums:
    """Of the images of one class; arrays of `(C,)`."""

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
        """Sum of squared distances from the mean."""
        # Values are of the order of 1 and sums in double precision, so little is lost here.
        return np.maximum(self.squares - self.images * self.mean**2, 0)


@dataclass(frozen=True)
class ClassGates:
    """The gates of one class's images.

    Attributes:
        images: how many.
        mean: of each channel, `(C,)`.
        std: between the images, of each channel, `(C,)`.
    """

    images: int
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Summary:
    """A block in a few numbers; deviations are in units of the gate, pooled over channels.

    Attributes:
        channels: how many the block has.
        mean: of all its values.
        saturated: share of the values above 0.95.
        closed: share below 0.05.
        between: deviation of the classes' means, less what the draw of the images adds to it.
        within: deviation of the images of one class.
    """

    channels: int
    mean: float
    saturated: float
    closed: float
    between: float
    within: float

    @property
    def specificity(self) -> float:
        """How far apart classes are relative to the spread within them."""
        return self.between / self.within if self.within else 0.0

    @property
    def verdict(self) -> str:
        """ "open" or "constant" for a gate that does next to nothing, which might be removed."""
        if self.saturated >= 0.9:
            return "open"
        # A gate that is the same for all images is a scale, which a norm or convolution has.
        return "constant" if np.hypot(self.between, self.within) < 0.01 else ""


class GateStatistics:
    """Of one block, from batches of any order.

    A class is folded into a few arrays of `(C,)` once all its images have been seen, so that with
    images in the order of their classes memory does not grow with the number of classes. Kept
    whole are only the means and deviations of the classes to be drawn.

    Attributes:
        kept: by label, those of them that are complete.
    """

    def __init__(self, counts: np.ndarray, keep: Iterable[int] = ()):
        """
        Args:
            counts: images that will come of each class, `(K,)`.
            keep: labels of the classes to be drawn.
        """
        self.counts = counts
        self.keep = set(keep)
        self.kept: dict[int, ClassGates] = {}
        self._open: dict[int, _Sums] = {}
        self._classes = self._images = self._squared_images = 0
        self._values = self._saturated = self._closed = 0

    def update(self, labels: np.ndarray, gates: np.ndarray) -> None:
        """Takes the values `(N, C)` of a batch with these labels `(N,)`."""
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
        # The weighted scatter of the means, by West's update.
        distance = sums.mean - self._mean
        self._mean += distance * sums.images / self._images
        self._between += sums.images * distance * (sums.mean - self._mean)
        self._classes += 1
        self._mean_of_classes += (sums.mean - self._mean_of_classes) / self._classes

    @property
    def mean_of_classes(self) -> np.ndarray:
        """The mean of the classes' means, `(C,)`, over the classes that have images."""
        return self._mean_of_classes

    def summary(self) -> Summary:
        """Of all that was seen.

        The two deviations are those of the one-way analysis of variance with random effects; with
        one class, or one image of each, what can't be told is 0.
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
            # Pooled before the root: of a channel that does not differ, the estimate is as often
            # below 0 as above.
            between=float(np.sqrt(max(between.mean(), 0))),
            within=float(np.sqrt(within.mean())),
        )
