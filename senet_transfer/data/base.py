"""Interface for classification datasets and the encoded samples that they return."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Tar member names are limited to 100 bytes. The remaining bytes are for a file extension.
MAX_KEY = 80


@dataclass(frozen=True)
class RawSample:
    """An encoded image with its label.

    Attributes:
        key: Sample name, unique within its dataset. It is never used as a path.
        label: Class index.
        data: Encoded image.
        origin: File or shard from which the image was read; used in error messages.
    """

    key: str
    label: int
    data: bytes
    origin: str

    @property
    def path(self) -> str:
        """Path of the image; for an image in a shard, the shard's path followed by the key."""
        return f"{self.origin}/{self.key}" if self.origin.endswith(".tar") else self.origin


def make_key(name: str, index: int) -> str:
    """Build a unique sample key from an image's path and its index in the image list.

    Webdataset treats everything after the first dot of a name as the extension and a slash as a
    folder separator, so keys contain neither. The index keeps the keys of similar paths distinct.
    """
    stem = re.sub(r"\.[A-Za-z0-9]+$", "", name.strip("/"))
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    return f"{stem[-(MAX_KEY - 10) :].lstrip('-_') or 'image'}_{index:09d}"


class ClassificationDataset(ABC):
    """Labelled images in a fixed order, grouped into units that are read sequentially.

    A unit is a shard or a single image.

    Attributes:
        classes: Class names, indexed by label.
        unit_sizes: Number of samples per unit, int64 `(U,)`.
        origin: Path or URL of the dataset; used in error messages.
    """

    def __init__(self, classes: list[str], unit_sizes: np.ndarray, origin: str):
        self.classes = classes
        self.unit_sizes = unit_sizes
        self.origin = origin

    def __len__(self) -> int:
        return int(self.unit_sizes.sum())

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without images."""
        return len(self.classes)

    @abstractmethod
    def read_unit(self, unit: int, skip: int = 0) -> Iterator[RawSample]:
        """Yield a unit's samples in order, without the first `skip` ones.

        A unit is a shard or a single image.
        """

    @abstractmethod
    def labels(self) -> np.ndarray:
        """Return the labels of all samples in order, `(len(self),)`."""

    @abstractmethod
    def read_sample(self, index: int) -> RawSample:
        """Read one sample by its index in the dataset."""


class SingleImages(ClassificationDataset):
    """Dataset whose images can be read individually.

    Each unit (see :class:`ClassificationDataset`) is therefore a single image.
    """

    def __init__(self, classes: list[str], count: int, origin: str):
        super().__init__(classes, np.ones(count, np.int64), origin)

    def read_unit(self, unit: int, skip: int = 0) -> Iterator[RawSample]:
        if skip == 0:
            yield self.read_sample(unit)
