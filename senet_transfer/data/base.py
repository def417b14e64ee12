"""Labelled images: one as it is stored, and a data set of them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Room for an extension in the 100 bytes that a tar member's name may have.
MAX_KEY = 80


@dataclass(frozen=True)
class RawSample:
    """An image as it is stored.

    Attributes:
        key: names the sample in its data set; never used as a path.
        label: the class, as a position in the list of classes.
        data: the encoded image.
        origin: the file or shard it came from, for messages.
    """

    key: str
    label: int
    data: bytes
    origin: str


def make_key(name: str, index: int) -> str:
    """The key of an image from its path in a list and its position there.

    Webdataset takes all after a name's first dot for the extension, and a slash for a folder, so
    neither may be in a key. Different paths can come out alike; the position keeps them apart.
    """
    stem = re.sub(r"\.[A-Za-z0-9]+$", "", name.strip("/"))
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    return f"{stem[-(MAX_KEY - 10) :].lstrip('-_') or 'image'}_{index:09d}"


class ClassificationDataset(ABC):
    """Labelled images in an order that never changes.

    Attributes:
        classes: names, the label being the position.
        unit_sizes: `(U,)` int64, samples in each unit.
        origin: where it is, for messages.
    """

    def __init__(self, classes: list[str], unit_sizes: np.ndarray, origin: str):
        self.classes = classes
        self.unit_sizes = unit_sizes
        self.origin = origin

    def __len__(self) -> int:
        return int(self.unit_sizes.sum())

    @property
    def num_classes(self) -> int:
        """The number of classes, with those that have no images."""
        return len(self.classes)

    @abstractmethod
    def read_unit(self, unit: int, skip: int = 0) -> Iterator[RawSample]:
        """Yields the samples of a unit in order, undecoded, without the first `skip`."""

    @abstractmethod
    def labels(self) -> np.ndarray:
        """All labels in order, `(len(self),)`."""

    @abstractmethod
    def read_sample(self, index: int) -> RawSample:
        """Reads one sample by its position in the data set."""


class SingleImages(ClassificationDataset):
    """Labelled images of which each is a unit."""

    def __init__(self, classes: list[str], count: int, origin: str):
        super().__init__(classes, np.ones(count, np.int64), origin)

    def read_unit(self, unit: int, skip: int = 0) -> Iterator[RawSample]:
        if skip == 0:
            yield self.read_sample(unit)
