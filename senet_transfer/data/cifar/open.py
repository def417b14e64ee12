"""Opening data sets of small images in any supported format."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from senet_transfer.data.base import ClassificationDataset, RawSample, SingleImages
from senet_transfer.data.cifar.archives import read_official
from senet_transfer.data.cifar.image_files import read_images, split_path
from senet_transfer.data.cifar.in_memory import SIDE, SPLITS, ImageArrays, load_images, split_file
from senet_transfer.data.classification.open import check_classes, open_dataset
from senet_transfer.data.images.decode import BrokenImageError, encode_exact
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.data.shards.manifest import MANIFEST
from senet_transfer.data.shards.storage import is_remote, local_path
from senet_transfer.errors import UserError

# Names of prepared data sets, and their paths relative to $DETECTRON2_DATASETS.
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
) -> ImageArrays:
    """Read a whole data set of small images.

    Supported are a prepared split or the folder of both; an official archive of CIFAR or the folder
    it was unpacked to; a folder with a folder or archive for each split; and everything that
    :func:`~senet_transfer.data.classification.open.open_dataset` supports, such as shards and a
    folder with one folder per class. Only images of this last group may be larger than 32 pixels;
    they are resized.

    Args:
        path: File, folder or address.
        split: "train" or "test"; used if the path does not determine the split.
        classes: Expected names of the classes, in the order of their labels.
        cache_dir: Folder for local copies of remote shards.

    Raises:
        UserError: If the data is of none of these kinds, is damaged, or has other classes.
    """
    data = None if is_remote(str(path)) else _open_split(local_path(str(path)), split)
    if data is None:
        role = {"train": "train_standard", "test": "val"}[split]
        data = decode_all(open_dataset(path, split=role, classes=classes, cache_dir=cache_dir))
    check_classes(path, data.classes, classes)
    return data


def cifar_name(dataset: str) -> str | None:
    """Return "cifar10" or "cifar100" for the name or path of its prepared files; else None."""
    for name, place in NAMES.items():
        if dataset == name or dataset.endswith(f"/{place}"):
            return name.partition("_")[0]
    return None


def is_prepared(path: str | Path) -> bool:
    """Return True for the path of a prepared split, a safetensors file."""
    return str(path).endswith(_PREPARED)


def _open_split(path: Path, split: str) -> ImageArrays | None:
    """Open data in a form that only CIFAR has; return None for anything else."""
    if is_prepared(path):
        return load_images(path)
    folder = path if path.is_dir() else path.parent
    if not (path.is_file() or path.is_dir()) or (folder / MANIFEST).is_file():
        return None
    if split_file(path, split).is_file():
        return load_images(split_file(path, split))
    splits = read_official(path)
    if splits is not None:
        return splits[split]
    images = split_path(path, split)
    return read_images(images) if images else None


class ArrayDataset(SingleImages):
    """A data set of single images, from images in memory."""

    def __init__(self, data: ImageArrays):
        super().__init__(list(data.classes), len(data), data.origin)
        self.data = data

    def labels(self) -> np.ndarray:
        return self.data.labels.numpy()

    def read_sample(self, index: int) -> RawSample:
        image = Image.fromarray(self.data.images[index].permute(1, 2, 0).numpy())
        label = int(self.data.labels[index])
        return RawSample(f"image_{index:06d}", label, encode_exact(image), self.origin)


def decode_all(dataset: ClassificationDataset) -> ImageArrays:
    """Decode all images of a data set, resized and cropped to 32x32 pixels as in evaluation.

    Raises:
        UserError: If an image can't be decoded, or the data set is empty.
    """
    view = EvalTransform(resize=SIDE, crop=SIDE)
    images, labels = [], []
    for unit in range(len(dataset.unit_sizes)):
        for sample in dataset.read_unit(unit):
            try:
                images.append(view(sample.data))
            except BrokenImageError as error:
                raise UserError(
                    f"The image {sample.key} in {sample.origin} can't be decoded ({error}). "
                    "Remove or replace it."
                ) from error
            labels.append(sample.label)
    if not images:
        raise UserError(f"{dataset.origin} contains no images. Choose another data set.")
    where = str(dataset.origin)
    numbers = torch.from_numpy(np.array(labels, np.int64))
    return ImageArrays(torch.stack(images), numbers, dataset.classes, where)
