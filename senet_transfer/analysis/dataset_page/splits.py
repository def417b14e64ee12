"""Config, images and annotated objects for the HTML page written by ``senet data show``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from senet_transfer.analysis.report.run_folder import data_label
from senet_transfer.config import is_classification
from senet_transfer.config.load import load_config
from senet_transfer.data.base import ClassificationDataset, RawSample, SingleImages
from senet_transfer.data.build import (
    open_test_dataset,
    open_train_dataset,
    use_classification_datasets,
)
from senet_transfer.data.cifar.in_memory import ImageArrays
from senet_transfer.data.cifar.open import ArrayDataset, cifar_name, is_prepared
from senet_transfer.data.detection.coco import register_shapes
from senet_transfer.data.own_data import find_parts
from senet_transfer.engine.setup import use_datasets
from senet_transfer.errors import UserError

# Default configs for detection data, image folders and small images.
RECIPES = ("finetune_detector", "finetune_folder", "cifar10_resnet20")


@dataclass(frozen=True)
class Objects:
    """Annotated objects of a dataset, excluding crowd annotations.

    Attributes:
        boxes: Left, top, right and bottom in pixels, float64 ``(N, 4)``.
        classes: Class indices, int64 ``(N,)``.
        images: Index of each object's image, int64 ``(N,)``, in ascending order.
        sizes: Width and height of each image in pixels, int64 ``(M, 2)``.
    """

    boxes: np.ndarray
    classes: np.ndarray
    images: np.ndarray
    sizes: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of objects per image, ``(M,)``."""
        return np.bincount(self.images, minlength=len(self.sizes))


@dataclass(frozen=True)
class Split:
    """Training or evaluation data.

    Attributes:
        name: Name or short path.
        role: "training data" or "evaluation data", followed by the name if there are several
            datasets of this type.
        trains: True for training data.
        classes: Class names.
        images: Encoded images. Their labels are meaningless for detection data.
        files: Path of each image in detection data; empty for classification data.
        objects: Annotated objects of the images; None for classification data.
    """

    name: str
    role: str
    trains: bool
    classes: Sequence[str]
    images: ClassificationDataset
    files: Sequence[str] = ()
    objects: Objects | None = None

    def name_of(self, index: int) -> str:
        """Return a short name for an image.

        The name is the file name for detection data, and the last two parts of the path for
        classification data.
        """
        if self.files:
            return self.files[index].rpartition("/")[2]
        sample = self.images.read_sample(index)
        path = f"{sample.origin}/{sample.key}" if self.in_memory else sample.path
        return "/".join(path.split("/")[-2:])

    @property
    def in_memory(self) -> bool:
        """True if the images are kept in memory."""
        return isinstance(self.images, ArrayDataset)

    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of images and objects per class, ``(C,)`` each.

        In classification data, each image counts as one object.
        """
        count = len(self.classes)
        if self.objects is None:
            images = np.bincount(self.images.labels(), minlength=count)
            return images, images
        pairs = np.unique(np.stack([self.objects.classes, self.objects.images]), axis=1)
        return (
            np.bincount(pairs[0], minlength=count),
            np.bincount(self.objects.classes, minlength=count),
        )


class ImageFiles(SingleImages):
    """Encoded images of a detection dataset."""

    def __init__(self, files: Sequence[str], origin: str):
        super().__init__([], len(files), origin)
        self.files = files

    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)

    def read_sample(self, index: int) -> RawSample:
        path = self.files[index]
        try:
            with PathManager.open(path, "rb") as file:
                return RawSample(str(index), 0, file.read(), path)
        except OSError as error:
            raise UserError(
                f"Cannot read {path}: {error}. Check that the file exists and is readable."
            ) from error


def open_splits(cfg: CfgNode) -> list[Split]:
    """Open the training and evaluation data of a config returned by ``data_config``."""
    splits = []
    for trains, names in ((True, cfg.DATASETS.TRAIN), (False, cfg.DATASETS.TEST)):
        role = "training data" if trains else "evaluation data"
        for name in names:
            label = data_label(name)
            full = f"{role} {label}" if len(names) > 1 else role
            if is_classification(cfg):
                opened = open_train_dataset(cfg) if trains else open_test_dataset(cfg, name)
                images = ArrayDataset(opened) if isinstance(opened, ImageArrays) else opened
                splits.append(Split(label, full, trains, images.classes, images))
                continue
            records = DatasetCatalog.get(name)
            files = [record["file_name"] for record in records]
            classes = list(MetadataCatalog.get(name).thing_classes)
            objects = read_objects(records)
            splits.append(
                Split(label, full, trains, classes, ImageFiles(files, name), files, objects)
            )
    return splits


def read_objects(records: Sequence[dict]) -> Objects:
    """Collect the objects in dataset dicts, with rotated boxes converted to axis-aligned boxes."""
    rows, classes, images = [], [], []
    for index, record in enumerate(records):
        for item in record.get("annotations", ()):
            if not item.get("iscrowd", 0):
                rows.append(_corners(item["bbox"], item["bbox_mode"]))
                classes.append(item["category_id"])
                images.append(index)
    return Objects(
        np.array(rows, np.float64).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(images, np.int64),
        np.array([(record["width"], record["height"]) for record in records], np.int64),
    )


def data_config(
    data: str = "",
    *,
    val: str = "",
    images: str = "",
    datasets: Sequence[Sequence[str]] = (),
    config_file: str = "",
    options: Sequence[str] = (),
) -> CfgNode:
    """Return a frozen config whose datasets are registered and checked as for training.

    Args:
        data: Data in any form that ``senet train --data`` accepts, or the name of a registered
            dataset.
        val: Evaluation data, in the same form. If empty, ``data`` is searched for it.
        images: Image folder for annotation files. If empty, the folder is searched for.
        datasets: Detection datasets as in ``--dataset``, in addition to ``data`` and ``val``.
        config_file: A YAML file or the name of a config. If empty, a config from
            :data:`RECIPES` is chosen for the data: detection data, classification data or CIFAR.
        options: Alternating config keys and values.

    Raises:
        UserError: If no data is specified, or if training would reject the data or the config.
    """
    register_shapes()
    names, entries = _named(data, val, images)
    entries += [list(entry) for entry in datasets]
    names += [entry[0] for entry in datasets]
    if not names and not config_file:
        raise UserError(
            "No data is specified. Pass a path with --data, register datasets with --dataset, or "
            "pass --config-file with a config that names datasets."
        )
    cfg = load_config(config_file or _recipe(names, entries), list(options))
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.REGISTER = [*cfg.DATASETS.REGISTER, *entries]
    if names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(names[:1]), tuple(names[1:])
    if is_classification(cfg):
        use_classification_datasets(cfg)
    else:
        use_datasets(cfg)
        if not cfg.DATASETS.CLASSES:
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which does not use "
                "boxes; expected a box detector or a classifier. Pass a different --config-file."
            )
    cfg.freeze()
    return cfg


def _corners(box: Sequence[float], mode: BoxMode) -> Sequence[float]:
    # BoxMode.convert creates a tensor for each box and takes 20 times as long.
    if mode == BoxMode.XYWH_ABS:
        left, top, width, height = box
        return left, top, left + width, top + height
    return BoxMode.convert(list(box), mode, BoxMode.XYXY_ABS)


def _named(data: str, val: str, images: str) -> tuple[list[str], list[list[str]]]:
    """Determine the names of the datasets in ``data`` and ``val``; see :func:`data_config`.

    Returns:
        The names of the datasets, and a ``DATASETS.REGISTER`` entry for each annotation file.
    """
    if not data or data in DatasetCatalog:
        return [name for name in (data, val) if name], []
    names: list[str] = []
    entries = []
    for part in filter(None, find_parts(data, val, images)):
        name = part.path
        if part.image_dir:
            name = Path(part.path).stem
            while name in names or name in DatasetCatalog:
                name += "_"
            entries.append([name, *part])
        names.append(name)
    return names, entries


def _recipe(names: Sequence[str], entries: Sequence[Sequence[str]]) -> str:
    detector, folder, small = RECIPES
    if entries or names[0] in DatasetCatalog:
        return detector
    return small if cifar_name(names[0]) or is_prepared(names[0]) else folder
