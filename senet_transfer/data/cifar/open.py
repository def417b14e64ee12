"""Functions for opening datasets of small images in any supported format."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from senet_transfer.data.base import ClassificationDataset, RawSample, SingleImages
from senet_transfer.data.cifar.archives import read_official
from senet_transfer.data.cifar.image_files import read_images, split_path
from senet_transfer.data.cifar.in_memory import SIDE, SPLITS, ImageArrays, load_images, split_file
from senet_transfer.data.classification.open import check_classes, open_dataset
from senet_transfer.data.images.decode import AS_STORED, BrokenImageError, Reading, encode_exact
from senet_transfer.data.images.label_csv import is_label_csv
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.data.shards.manifest import MANIFEST
from senet_transfer.data.shards.storage import is_remote, local_path
from senet_transfer.errors import UserError

# Paths of prepared datasets relative to $DETECTRON2_DATASETS, by name.
NAMES = {
    f"{data}_{split}": f"{data}/{split}.safetensors"
    for data in ("cifar10", "cifar100")
    for split in SPLITS
}

_PREPARED = ".safetensors"


def open_cifar(
    path: str | Path,
    *,
    split: str,
    classes: list[str] | None = None,
    cache_dir: str | Path | None = None,
    reading: Reading = AS_STORED,
) -> ImageArrays:
    """Load a dataset of small images into memory.

    The supported formats are:

    - a prepared split, or the folder with both prepared splits;
    - an official CIFAR archive, packed or unpacked;
    - a folder with a subfolder or archive per split;
    - any format supported by :func:`~senet_transfer.data.classification.open.open_dataset`, such as
      shards or a folder with one folder per class. Only these formats support images larger than
      32x32 pixels, which are resized and cropped.

    Args:
        path: Path of a file or folder, or a remote URL.
        split: "train" or "test"; ignored if the path determines the split.
        classes: Expected class names in label order.
        cache_dir: Folder for local copies of remote shards.
        reading: Settings for reading image files.

    Raises:
        UserError: If the data has an unsupported format, is damaged, or has different classes.
    """
    data = None
    if not is_remote(str(path)):
        data = _open_split(local_path(str(path)), split, classes, reading)
    if data is None:
        role = {"train": "train_standard", "test": "val"}[split]
        found = open_dataset(path, split=role, classes=classes, cache_dir=cache_dir)
        data = decode_all(found, reading)
    check_classes(path, data.classes, classes)
    return data


def cifar_name(dataset: str) -> str | None:
    """Return "cifar10" or "cifar100" if a name or path refers to prepared CIFAR data, else None."""
    for name, place in NAMES.items():
        if dataset == name or dataset.endswith(f"/{place}"):
            return name.partition("_")[0]
    return None


def is_prepared(path: str | Path) -> bool:
    """Return True if a path refers to a prepared split (a safetensors file)."""
    return str(path).endswith(_PREPARED)


def _open_split(
    path: Path, split: str, classes: list[str] | None, reading: Reading
) -> ImageArrays | None:
    """Load prepared images, official CIFAR files or a split's image folder into memory.

    Return None for data in other formats.
    """
    if is_prepared(path):
        return load_images(path)
    if is_label_csv(path):
        return None
    folder = path if path.is_dir() else path.parent
    if not (path.is_file() or path.is_dir()) or (folder / MANIFEST).is_file():
        return None
    if split_file(path, split).is_file():
        return load_images(split_file(path, split))
    splits = read_official(path)
    if splits is not None:
        return splits[split]
    images = split_path(path, split)
    return read_images(images, classes=classes, reading=reading) if images else None


class ArrayDataset(SingleImages):
    """Classification dataset of images that are kept in memory."""

    def __init__(self, data: ImageArrays):
        super().__init__(list(data.classes), len(data), data.origin)
        self.data = data

    def labels(self) -> np.ndarray:
        return self.data.labels.numpy()

    def read_sample(self, index: int) -> RawSample:
        image = Image.fromarray(self.data.images[index].permute(1, 2, 0).numpy())
        label = int(self.data.labels[index])
        return RawSample(f"image_{index:06d}", label, encode_exact(image), self.data.path(index))


def decode_all(dataset: ClassificationDataset, reading: Reading = AS_STORED) -> ImageArrays:
    """Decode all images of a dataset, and resize and crop them to 32x32 as in evaluation.

    Raises:
        UserError: If an image cannot be decoded or the dataset is empty.
    """
    view = EvalTransform(resize=SIDE, crop=SIDE, reading=reading)
    images, labels, paths = [], [], []
    for unit in range(len(dataset.unit_sizes)):
        for sample in dataset.read_unit(unit):
            try:
                images.append(view(sample.data))
            except BrokenImageError as error:
                raise UserError(
                    f"Cannot decode image {sample.key} in {sample.origin} ({error}). Remove or "
                    "replace it."
                ) from error
            labels.append(sample.label)
            paths.append(sample.path)
    if not images:
        raise UserError(f"{dataset.origin} contains no images. Choose a different dataset.")
    numbers = torch.from_numpy(np.array(labels, np.int64))
    return ImageArrays(torch.stack(images), numbers, dataset.classes, dataset.origin, paths)
