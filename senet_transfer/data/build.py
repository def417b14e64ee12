"""Functions that build classification datasets, transforms and loaders from a config.

All config keys for classification data are read in this module, except for the augmentation keys,
which are read in :mod:`senet_transfer.data.images.augmentation`.
"""

import functools
import math
import os
import re
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils import comm

from senet_transfer.config import is_classification
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.cifar.image_files import split_path
from senet_transfer.data.cifar.in_memory import SIDE, ImageArrays
from senet_transfer.data.cifar.loader import CifarEvalLoader, CifarTrainLoader
from senet_transfer.data.cifar.open import NAMES, cifar_name, is_prepared, open_cifar
from senet_transfer.data.cifar.transforms import CifarAugment
from senet_transfer.data.classification.loader import (
    ClassificationLoader,
    build_classification_eval_loader,
    build_classification_train_loader,
)
from senet_transfer.data.classification.open import matches_files, open_dataset
from senet_transfer.data.images.augmentation import build_augmentation
from senet_transfer.data.images.class_names import match_names
from senet_transfer.data.images.decode import Reading
from senet_transfer.data.images.folders import choose_classes
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform
from senet_transfer.data.reading import reading_of, warn_if_dark
from senet_transfer.data.shards.storage import is_remote
from senet_transfer.errors import UserError, check_choice
from senet_transfer.utils.text import first_of

SAMPLERS = ("TrainingSampler", "ClassAwareSampler")
AUGMENTS = ("region", "pad_crop")


def use_classification_datasets(
    cfg: CfgNode, *, eval_only: bool = False, classes: str = ""
) -> None:
    """Open the datasets listed in a config, and store their absolute paths and classes in it.

    Args:
        cfg: Config, modified in place.
        eval_only: Whether to open only the datasets in ``DATASETS.TEST``.
        classes: Order of the labels: "numeric", or the path of a file with one class name per line.
            If empty, the order of ``DATASETS.CLASSES`` is used or, if that is also empty, the order
            in the data.

    Raises:
        UserError: If a dataset is missing or damaged, or the datasets have different classes.
    """
    if cfg.DATASETS.REGISTER:
        raise UserError(
            "DATASETS.REGISTER and --dataset only support detection data. For a classifier, set "
            "DATASETS.TRAIN to the path of the data, such as DATASETS.TRAIN \"('my/train',)\"."
        )
    if len(cfg.DATASETS.TRAIN) != 1 and not eval_only:
        raise UserError(
            f"DATASETS.TRAIN has {len(cfg.DATASETS.TRAIN)} entries; expected exactly one: a "
            "folder of shards, a CSV file, or a folder with one folder per class. Set it to a "
            "single dataset."
        )
    _check_augment(cfg)
    if not cfg.DATASETS.TEST and eval_only:
        raise UserError("DATASETS.TEST is empty; expected the path of an evaluation dataset.")
    # Absolute paths keep the saved config valid in any working directory. With eval_only, the
    # training data may be missing.
    if not eval_only:
        cfg.DATASETS.TRAIN = tuple(find_dataset(name) for name in cfg.DATASETS.TRAIN)
    cfg.DATASETS.TEST = tuple(find_dataset(name) for name in cfg.DATASETS.TEST)
    if classes:
        first = cfg.DATASETS.TEST[0] if eval_only else cfg.DATASETS.TRAIN[0]
        cfg.DATASETS.CLASSES = choose_classes(classes, _class_folders(cfg, first, eval_only))
    if not eval_only:
        cfg.DATASETS.CLASSES = list(open_train_dataset(cfg).classes)
        if len(cfg.DATASETS.CLASSES) == 1:
            raise UserError(
                f"{cfg.DATASETS.TRAIN[0]} has a single class, {cfg.DATASETS.CLASSES[0]}; expected "
                "at least two, because a classifier with a single class has nothing to learn. "
                "Pass the folder that contains the class folders."
            )
    for name in cfg.DATASETS.TEST:
        cfg.DATASETS.CLASSES = list(open_test_dataset(cfg, name).classes)
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = len(cfg.DATASETS.CLASSES)


def check_brightness(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Warn about datasets whose 16-bit images would be almost black after conversion to 8 bits."""
    opened = {} if eval_only else {name: open_train_dataset(cfg) for name in cfg.DATASETS.TRAIN}
    opened |= {name: open_test_dataset(cfg, name) for name in cfg.DATASETS.TEST}
    for name, dataset in opened.items():
        if isinstance(dataset, ClassificationDataset):
            warn_of_dataset(dataset, name, reading_of(cfg))


def warn_of_dataset(dataset: ClassificationDataset, name: str, reading: Reading) -> None:
    """Warn if a local dataset's 16-bit images would be almost black after conversion to 8 bits."""
    if not is_remote(name):
        warn_if_dark(name, reading, len(dataset), lambda index: dataset.read_sample(index).data)


def _class_folders(cfg: CfgNode, name: str, eval_only: bool) -> Path:
    """Return the folder that contains a dataset's class folders."""
    path = Path(name)
    if in_memory(cfg) and path.is_dir():
        return split_path(path, "test" if eval_only else "train") or path
    return path


def use_class_weights(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Replace "auto" in ``MODEL.CLASSIFIER.CLASS_WEIGHTS`` with numbers, and check the weights.

    A class's weight is inversely proportional to its number of training images. The weights of the
    classes with images have a mean of 1. A class without images has a weight of 1.

    Args:
        cfg: Config whose classes have been set, modified in place. A detector's config is not
            changed.
        eval_only: If True, leave the config unchanged, because evaluation does not use the weights.

    Raises:
        UserError: If the weights are not one non-negative number per class, or are all 0.
    """
    if eval_only or not is_classification(cfg):
        return
    options = cfg.MODEL.CLASSIFIER
    weights, count = options.CLASS_WEIGHTS, options.NUM_CLASSES
    if weights == "auto":
        labels = open_train_dataset(cfg).labels
        found = np.bincount(np.asarray(labels() if callable(labels) else labels), minlength=count)
        inverse = 1 / np.maximum(found, 1)
        scaled = np.where(found, inverse / inverse[found > 0].mean(), 1.0)
        options.CLASS_WEIGHTS = scaled.tolist()
        return
    if not weights:
        return
    numbers = isinstance(weights, list | tuple) and all(
        type(value) in (int, float) and 0 <= value < math.inf for value in weights
    )
    if not numbers or len(weights) != count or not any(weights):
        raise UserError(
            f"MODEL.CLASSIFIER.CLASS_WEIGHTS is {weights!r}; expected auto, or {count} "
            "non-negative numbers, not all of them 0, in the order of the classes: "
            f"{first_of(cfg.DATASETS.CLASSES)}."
        )


def use_class_order(cfg: CfgNode, classes: list[str], *, eval_only: bool = False) -> bool:
    """Set the class order of a config, if its datasets support that order.

    Args:
        cfg: Config after :func:`use_classification_datasets`.
        classes: Class names in the new order. All classes of the datasets must be among them;
            additional classes are allowed.
        eval_only: Whether to ignore the training data.

    Returns:
        True if the order was set. False if a class of the datasets is not in ``classes``, or if
        the labels of a dataset are fixed, as in shards. The config is then not changed.
    """
    found = list(cfg.DATASETS.CLASSES)
    if len(match_names(found, classes)) < len(found):
        return False
    ordered = cfg.clone()
    ordered.defrost()
    ordered.DATASETS.CLASSES = list(classes)
    try:
        if not eval_only:
            open_train_dataset(ordered)
        for name in cfg.DATASETS.TEST:
            open_test_dataset(ordered, name)
    except UserError:
        return False
    cfg.DATASETS.CLASSES = list(classes)
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = len(classes)
    return True


def _check_augment(cfg: CfgNode) -> None:
    options = cfg.INPUT.CLASSIFICATION
    check_choice("INPUT.CLASSIFICATION.AUGMENT", options.AUGMENT, AUGMENTS)
    if in_memory(cfg):
        # Called only to validate the other pad_crop options, which CifarAugment checks.
        small_augment(cfg)
        sizes = (options.CROP, options.TEST_RESIZE, options.TEST_CROP)
        if set(sizes) != {SIDE} or options.TEST_MODE == "ten_crop":
            raise UserError(
                f"INPUT.CLASSIFICATION: CROP, TEST_RESIZE and TEST_CROP are {sizes}, and "
                f"TEST_MODE is {options.TEST_MODE}; AUGMENT pad_crop requires sizes of {SIDE} "
                f"pixels and a TEST_MODE with a single crop. Set all three sizes to {SIDE} and "
                "TEST_MODE to short_side, or set AUGMENT to region."
            )
    build_augmentation(cfg)
    if options.CUTOUT and not in_memory(cfg):
        raise UserError(
            f"INPUT.CLASSIFICATION.CUTOUT is {options.CUTOUT}, but AUGMENT is region, which does "
            "not support Cutout. Set CUTOUT to 0 or AUGMENT to pad_crop."
        )


def in_memory(cfg: CfgNode) -> bool:
    """Return True if the config's datasets are kept in memory, as for CIFAR."""
    return cfg.INPUT.CLASSIFICATION.AUGMENT == "pad_crop"


def find_dataset(name: str) -> str:
    """Return the absolute path of a dataset.

    Args:
        name: Path, or glob pattern of shards, relative to the working directory or to
            ``$DETECTRON2_DATASETS``; the name of a prepared dataset such as ``cifar10_train``; or
            a remote URL, which is returned unchanged.

    Raises:
        UserError: If the dataset does not exist.
    """
    if not isinstance(name, str):
        raise UserError(
            f"DATASETS.TRAIN or DATASETS.TEST contains {name!r}; expected the path or name of a "
            "dataset."
        )
    if is_remote(name):
        return name
    cifar = cifar_name(name)
    name = NAMES.get(name, name)
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    places = [os.path.abspath(os.path.expanduser(place)) for place in (name, f"{root}/{name}")]
    # Existing paths have priority, because a file name may contain pattern characters.
    for is_found in (os.path.exists, matches_files):
        for place in places:
            if is_found(place):
                return place
    if cifar is not None:
        remedy = f"Run `senet data cifar --download {cifar}`, or correct the path"
    else:
        remedy = (
            "Expected a folder of shards, an official distribution of Places365 or CIFAR, a CSV "
            "file with the columns path and label, or a folder with one folder per class"
        )
    raise UserError(
        f"Dataset {name} not found; tried {' and '.join(dict.fromkeys(places))}. {remedy}. "
        "datasets/README.md describes the supported layouts. Relative paths are also searched in "
        "$DETECTRON2_DATASETS."
    )


def open_train_dataset(cfg: CfgNode) -> ClassificationDataset | ImageArrays:
    """Open the training dataset."""
    # The path of a complete Places365 folder does not determine the split, so the smaller train
    # split is used. The larger one is selected with the path of its image folder.
    return _open(cfg, cfg.DATASETS.TRAIN[0], "train" if in_memory(cfg) else "train_standard")


def open_test_dataset(cfg: CfgNode, name: str) -> ClassificationDataset | ImageArrays:
    """Open an evaluation dataset by its name in ``DATASETS.TEST``."""
    return _open(cfg, name, "test" if in_memory(cfg) else "val")


def inference_dir(cfg: CfgNode, name: str) -> str:
    """Return the folder for the predictions on a dataset in ``DATASETS.TEST``.

    The path is relative to the run's output folder.
    """
    last = re.sub(r"[^\w-]+", "_", name.rstrip("/").rpartition("/")[2])
    place = list(cfg.DATASETS.TEST).index(name)
    return os.path.join("inference", last if len(cfg.DATASETS.TEST) == 1 else f"{place}_{last}")


def _open(cfg: CfgNode, name: str, split: str) -> ClassificationDataset | ImageArrays:
    classes = tuple(cfg.DATASETS.CLASSES)
    try:
        small = reading_of(cfg) if in_memory(cfg) else None
        return _open_once(name, split, classes, cfg.DATALOADER.CACHE_DIR, small)
    except UserError as error:
        known = "" if not cfg.DATASETS.CLASSES else (
            " (The expected classes are specified by DATASETS.CLASSES in the config, or by "
            "DATASETS.TRAIN.)"
        )  # fmt: skip
        raise UserError(f"Cannot open dataset {name}: {error}{known}") from error


# Cached because a run opens its datasets several times, and listing a million files is slow.
@functools.lru_cache(maxsize=8)
def _open_once(
    name: str, split: str, classes: tuple[str, ...], cache_dir: str, small: Reading | None
) -> ClassificationDataset | ImageArrays:
    """Open a dataset, or return the cached dataset if it has already been opened.

    ``small`` contains the settings for reading a dataset of small images, which is loaded into
    memory. It is None for a dataset that is not loaded into memory.
    """
    if is_prepared(name) and not small:
        raise UserError(
            "INPUT.CLASSIFICATION.AUGMENT is region, but a file written by prepare_cifar.py "
            "requires pad_crop. Set AUGMENT to pad_crop and CROP, TEST_RESIZE and TEST_CROP to 32, "
            "or start from configs/base/cifar10."
        )
    open_any = functools.partial(open_cifar, reading=small) if small else open_dataset
    return open_any(name, split=split, classes=list(classes) or None, cache_dir=cache_dir or None)


def train_transform(cfg: CfgNode) -> TrainTransform:
    """Build the training transform specified in ``INPUT.CLASSIFICATION``."""
    options = cfg.INPUT.CLASSIFICATION
    return TrainTransform(
        size=options.CROP,
        scale=tuple(options.SCALE),
        ratio=tuple(options.RATIO),
        flip=options.FLIP,
        interpolation=options.INTERPOLATION,
        draft=options.DRAFT,
        reading=reading_of(cfg),
        augment=build_augmentation(cfg),
    )


def eval_transform(cfg: CfgNode) -> EvalTransform:
    """Build the evaluation transform specified in ``INPUT.CLASSIFICATION``."""
    options = cfg.INPUT.CLASSIFICATION
    return EvalTransform(
        mode=options.TEST_MODE,
        resize=options.TEST_RESIZE,
        crop=options.TEST_CROP,
        interpolation=options.INTERPOLATION,
        reading=reading_of(cfg),
    )


def small_augment(cfg: CfgNode) -> CifarAugment:
    """Build the augmentation for small images (``AUGMENT: "pad_crop"``)."""
    options = cfg.INPUT.CLASSIFICATION
    return CifarAugment(
        flip=options.FLIP, pad=options.PAD, padding=options.PADDING, cutout=options.CUTOUT
    )


def train_loader(
    cfg: CfgNode,
    seed: int,
    start_iter: int = 0,
    transform: TrainTransform | EvalTransform | None = None,
) -> ClassificationLoader | CifarTrainLoader:
    """Build this process's training loader.

    Args:
        cfg: Config of the run.
        seed: Random seed of the run; must be the same in all processes.
        start_iter: Iteration to start from.
        transform: Transform to use instead of the config's. Not used for images that are kept in
            memory.

    Raises:
        UserError: If the sampler is not supported or the data cannot be opened.
    """
    samplers = SAMPLERS[:1] if in_memory(cfg) else SAMPLERS
    if cfg.DATALOADER.SAMPLER_TRAIN not in samplers:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}, which is not supported "
            "for a "
            f"classifier{' with INPUT.CLASSIFICATION.AUGMENT pad_crop' if in_memory(cfg) else ''}; "
            f"expected one of: {', '.join(samplers)}."
        )
    share = {
        "batch_size": cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        "seed": seed,
        "rank": comm.get_rank(),
        "world_size": comm.get_world_size(),
        "start_iter": start_iter,
    }
    dataset = open_train_dataset(cfg)
    if isinstance(dataset, ImageArrays):
        augment = small_augment(cfg)
        planned = cfg.SOLVER.COMPILE == "graph"
        return CifarTrainLoader(
            dataset, augment=augment, device=cfg.MODEL.DEVICE, planned=planned, **share
        )
    return build_classification_train_loader(
        dataset,
        **share,
        transform=transform or train_transform(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        class_aware=cfg.DATALOADER.SAMPLER_TRAIN == "ClassAwareSampler",
        shuffle_block=cfg.DATALOADER.SHUFFLE_BLOCK,
        max_skip_ratio=cfg.DATALOADER.MAX_SKIP_RATIO,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )


def test_loader(cfg: CfgNode, name: str) -> ClassificationLoader | CifarEvalLoader:
    """Build the evaluation loader for this process's share of a dataset."""
    share = {
        "batch_size": max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1),
        "rank": comm.get_rank(),
        "world_size": comm.get_world_size(),
    }
    dataset = open_test_dataset(cfg, name)
    if isinstance(dataset, ImageArrays):
        return CifarEvalLoader(dataset, device=cfg.MODEL.DEVICE, **share)
    return build_classification_eval_loader(
        dataset,
        **share,
        transform=eval_transform(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )
