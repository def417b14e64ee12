"""Datasets of 32x32 images kept in memory, such as CIFAR-10 and CIFAR-100.

`datasets/prepare_cifar.py` converts a downloaded dataset to one safetensors file per split, with a
checksum of the content. Loading such a file cannot execute code.
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
    """Labelled images of the same size.

    Attributes:
        images: RGB images, uint8 `(N, 3, 32, 32)`.
        labels: Class indices, int64 `(N,)`.
        classes: Class names, indexed by label.
        origin: Path of the data; used in error messages.
        paths: Path of each image. Empty if the images are not separate files.

    Raises:
        UserError: If a shape or type is wrong, or a label is out of range.
    """

    images: Tensor
    labels: Tensor
    classes: Sequence[str]
    origin: str
    paths: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape, count = tuple(self.images.shape), len(self.labels)
        if shape != (count, 3, SIDE, SIDE) or self.images.dtype != torch.uint8 or count == 0:
            raise UserError(
                f"{self.origin} has images of shape {shape} ({self.images.dtype}) and {count} "
                f"labels; expected uint8 images of shape ({max(count, 1)}, 3, {SIDE}, {SIDE}). "
                "Prepare the data again with `senet data cifar`."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise UserError(
                f"{self.origin} has labels from {low} to {high}, but {len(self.classes)} classes; "
                f"expected labels from 0 to {len(self.classes) - 1}. Download or prepare the data "
                "again."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without images."""
        return len(self.classes)

    def path(self, index: int) -> str:
        """Return the path of an image, or `origin/index` if it is not a separate file."""
        return self.paths[index] if self.paths else f"{self.origin}/{index}"

    def class_counts(self) -> list[int]:
        """Return the number of images per class."""
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()


def split_file(folder: str | Path, split: str) -> Path:
    """Return the path of a prepared split, such as `cifar10/train.safetensors`."""
    return Path(folder) / f"{split}.safetensors"


def save_images(data: ImageArrays, path: Path, source: str) -> None:
    """Write a prepared split atomically.

    Args:
        data: Images and labels of the split.
        path: File to write.
        source: Source name to store in the file's metadata.

    Raises:
        UserError: If the file cannot be written.
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
            f"Cannot write {path}: {error}. Free disk space or choose a different folder."
        ) from error


def _checksum(tensors: dict[str, Tensor], classes: Any) -> str:
    names = json.dumps(classes)
    return hashlib.sha256(f"{tensors_sha256(tensors)} {names}".encode()).hexdigest()


def load_images(path: str | Path) -> ImageArrays:
    """Load a prepared split.

    Args:
        path: Path of the file, as returned by :func:`split_file`.

    Raises:
        UserError: If the file does not exist, is damaged or has a different format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"No prepared dataset found at {path}; expected a file written by "
            "`senet data cifar`. Run this command, or correct the path or "
            "$DETECTRON2_DATASETS."
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            # Cloned because safetensors memory-maps the file, which may change on disk.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"Cannot read {path} ({error}). Prepare the data again.") from error
    if not isinstance(about, dict) or tensors.keys() != {"images", "labels"}:
        raise UserError(
            f"{path} was not written by `senet data cifar`: it contains the tensors "
            f"{sorted(tensors)[:5]}; expected images and labels. Pass a prepared file."
        )
    if about.get("version") != _VERSION or about.get("sha256") != _checksum(
        tensors, about.get("classes")
    ):
        raise UserError(
            f"{path} is damaged or was written by a different version: its content does not match "
            "its checksum. Prepare the data again with `senet data cifar`."
        )
    return ImageArrays(tensors["images"], tensors["labels"], about["classes"], str(path))
