"""Data sets of 32x32 images that are kept in memory, such as CIFAR-10 and CIFAR-100.

`datasets/prepare_cifar.py` converts a downloaded data set to one file per split. It is a
safetensors file, which can't execute code, with a checksum of its content.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_path
from senet_transfer.utils.hashing import tensors_sha256

SIDE = 32

SPLITS = ("train", "test")

_METADATA = "senet_transfer_images"
_VERSION = 1


@dataclass(frozen=True)
class ImageArrays:
    """Labelled images of one size.

    Attributes:
        images: uint8 RGB `(N, 3, 32, 32)`.
        labels: int64 `(N,)`.
        classes: names of the classes, indexed by label.
        origin: path of the data, for messages.

    Raises:
        UserError: shapes or types are wrong, or a label has no class.
    """

    images: Tensor
    labels: Tensor
    classes: Sequence[str]
    origin: str

    def __post_init__(self) -> None:
        shape, count = tuple(self.images.shape), len(self.labels)
        if shape != (count, 3, SIDE, SIDE) or self.images.dtype != torch.uint8 or count == 0:
            raise UserError(
                f"{self.origin} has images of shape {shape} ({self.images.dtype}) and {count} "
                f"labels; expected uint8 images ({max(count, 1)}, 3, {SIDE}, {SIDE}). Prepare the "
                "data again with datasets/prepare_cifar.py."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise UserError(
                f"{self.origin} has labels from {low} to {high} and {len(self.classes)} classes; "
                f"expected labels from 0 to {len(self.classes) - 1}. Get the data again."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without images."""
        return len(self.classes)

    def class_counts(self) -> list[int]:
        """Return the number of images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()


def split_file(folder: str | Path, split: str) -> Path:
    """Return the path of a prepared split, such as `cifar10/train.safetensors`."""
    return Path(folder) / f"{split}.safetensors"


def save_images(data: ImageArrays, path: Path, source: str) -> None:
    """Write a prepared split atomically.

    Args:
        data: the images and labels of the split.
        path: the file to write.
        source: name of the source, stored in the file's metadata.

    Raises:
        UserError: the file can't be written.
    """
    tensors = {"images": data.images.contiguous(), "labels": data.labels.contiguous()}
    about = {
        "version": _VERSION,
        "classes": list(data.classes),
        "source": source,
        "sha256": _checksum(tensors, list(data.classes)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            save_file(tensors, partial, {_METADATA: json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} can't be written: {error}. Free disk space or choose another folder."
        ) from error


def _checksum(tensors: dict[str, Tensor], classes: Any) -> str:
    names = json.dumps(classes)
    return hashlib.sha256(f"{tensors_sha256(tensors)} {names}".encode()).hexdigest()


def load_images(path: str | Path) -> ImageArrays:
    """Load a prepared split.

    Args:
        path: the file, as returned by :func:`split_file`.

    Raises:
        UserError: the file does not exist, is damaged or has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no prepared data set at {path}; expected a file that "
            "datasets/prepare_cifar.py wrote. Run it, or correct the path ($DETECTRON2_DATASETS)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            # Cloned because safetensors maps the file into memory, which may change on disk.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({error}). Prepare the data again.") from error
    if not isinstance(about, dict) or tensors.keys() != {"images", "labels"}:
        raise UserError(
            f"{path} was not written by datasets/prepare_cifar.py: it contains "
            f"{sorted(tensors)[:5]}; expected the tensors images and labels. Name a prepared file."
        )
    if about.get("version") != _VERSION or about.get("sha256") != _checksum(
        tensors, about.get("classes")
    ):
        raise UserError(
            f"{path} is damaged or has another version: its content does not match its checksum. "
            "Prepare the data again with datasets/prepare_cifar.py."
        )
    return ImageArrays(tensors["images"], tensors["labels"], about["classes"], str(path))
