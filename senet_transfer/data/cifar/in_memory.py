"""CIFAR-10, CIFAR-100 and what is like them: a whole data set of 32x32 images in memory.

A prepared split is one file, which `datasets/prepare_cifar.py` writes from what people download.
It is a safetensors file: data alone, nothing in it is executed, and with a checksum of its content.
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
from senet_transfer.utils.atomic_io import whole_file
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
        classes: names, the label being the position.
        origin: where they are from, for messages.

    Raises:
        UserError: the parts don't fit together.
    """

    images: Tensor
    labels: Tensor
    classes: Sequence[str]
    origin: str

    def __post_init__(self) -> None:
        shape, count = tuple(self.images.shape), len(self.labels)
        if shape != (count, 3, SIDE, SIDE) or self.images.dtype != torch.uint8 or count == 0:
            raise UserError(
                f"{self.origin} holds images of shape {shape} ({self.images.dtype}) and {count} "
                f"labels; expected uint8 images ({max(count, 1)}, 3, {SIDE}, {SIDE}). Prepare the "
                "data again with datasets/prepare_cifar.py."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise UserError(
                f"{self.origin} has labels from {low} to {high}, and {len(self.classes)} classes; "
                f"expected labels from 0 to {len(self.classes) - 1}. Get the data again."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes, with those that have no images."""
        return len(self.classes)

    def class_counts(self) -> list[int]:
        """Images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()


def split_file(folder: str | Path, split: str) -> Path:
    """The file of a prepared split, such as `cifar10/train.safetensors`."""
    return Path(folder) / f"{split}.safetensors"


def save_images(data: ImageArrays, path: Path, source: str) -> None:
    """Writes a prepared split: the whole file, or none.

    Args:
        data: the split.
        path: the file.
        source: what it was made from, kept in the file.

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
        with whole_file(path) as partial:
            save_file(tensors, partial, {_METADATA: json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} can't be written: {error}. Make room or name another folder."
        ) from error


def _checksum(tensors: dict[str, Tensor], classes: Any) -> str:
    names = json.dumps(classes)
    return hashlib.sha256(f"{tensors_sha256(tensors)} {names}".encode()).hexdigest()


def load_images(path: str | Path) -> ImageArrays:
    """Loads a prepared split.

    Args:
        path: the file, as :func:`split_file` names it.

    Raises:
        UserError: there is none, or it is damaged or something else.
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
            # Copies: the library's tensors are the file's pages, and go with it when it changes.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({error}). Prepare the data again.") from error
    if not isinstance(about, dict) or tensors.keys() != {"images", "labels"}:
        raise UserError(
            f"{path} holds no images of datasets/prepare_cifar.py: found {sorted(tensors)[:5]}. "
            "Weights? Name the data's file."
        )
    if about.get("version") != _VERSION or about.get("sha256") != _checksum(
        tensors, about.get("classes")
    ):
        raise UserError(
            f"{path} is damaged, or of another version: its content is not what its checksum "
            "says. Prepare the data again with datasets/prepare_cifar.py."
        )
    return ImageArrays(tensors["images"], tensors["labels"], about["classes"], str(path))
