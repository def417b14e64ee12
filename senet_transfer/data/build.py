"""From a config to classification's data: the only place that reads its keys for data."""

import functools
import os
import re

from detectron2.config import CfgNode
from detectron2.utils import comm

from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.cifar.in_memory import SIDE, ImageArrays
from senet_transfer.data.cifar.loader import CifarEvalLoader, CifarTrainLoader
from senet_transfer.data.cifar.open import NAMES, cifar_name, is_prepared, open_cifar
from senet_transfer.data.cifar.transforms import CifarAugment
from senet_transfer.data.classification.loader import (
    ClassificationLoader,
    build_classification_eval_loader,
    build_classification_train_loader,
)
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform
from senet_transfer.data.shards.storage import is_remote
from senet_transfer.errors import UserError, check_choice

SAMPLERS = ("TrainingSampler", "ClassAwareSampler")
AUGMENTS = ("region", "pad_crop")


def use_classification_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Opens the config's data sets, takes the classes from them and writes them into the config.

    Raises:
        UserError: a data set is missing, damaged, or has other classes than the rest.
    """
    if cfg.DATASETS.REGISTER:
        raise UserError(
            "DATASETS.REGISTER and --dataset are for data in COCO's format; a classifier's data "
            "is named by its path: DATASETS.TRAIN \"('my/train',)\"."
        )
    if len(cfg.DATASETS.TRAIN) != 1 and not eval_only:
        raise UserError(
            f"DATASETS.TRAIN has {len(cfg.DATASETS.TRAIN)} entries, and a classifier trains on "
            "one: a folder of shards, or a tree with a folder a class."
        )
    _check_augment(cfg)
    if not cfg.DATASETS.TEST and eval_only:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate on. Name data there.")
    # Absolute, so that the saved config works from any folder. What is not used is left alone.
    if not eval_only:
        cfg.DATASETS.TRAIN = tuple(find_dataset(name) for name in cfg.DATASETS.TRAIN)
    cfg.DATASETS.TEST = tuple(find_dataset(name) for name in cfg.DATASETS.TEST)
    if not eval_only:
        cfg.DATASETS.CLASSES = list(open_train_dataset(cfg).classes)
    for name in cfg.DATASETS.TEST:
        cfg.DATASETS.CLASSES = list(open_test_dataset(cfg, name).classes)
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = len(cfg.DATASETS.CLASSES)


def _check_augment(cfg: CfgNode) -> None:
    options = cfg.INPUT.CLASSIFICATION
    check_choice("INPUT.CLASSIFICATION.AUGMENT", options.AUGMENT, AUGMENTS)
    if in_memory(cfg):
        # The other options of this way are checked by what they go to.
        small_augment(cfg)
        sizes = (options.CROP, options.TEST_RESIZE, options.TEST_CROP)
        if set(sizes) != {SIDE} or options.TEST_MODE == "ten_crop":
            raise UserError(
                f"INPUT.CLASSIFICATION: CROP, TEST_RESIZE and TEST_CROP are {sizes} and TEST_MODE "
                f"{options.TEST_MODE}; with AUGMENT pad_crop images have {SIDE} pixels and one "
                f"view. Set all three to {SIDE} and TEST_MODE to short_side, or AUGMENT to region."
            )
    elif options.CUTOUT:
        raise UserError(
            f"INPUT.CLASSIFICATION.CUTOUT is {options.CUTOUT} and AUGMENT region, which has no "
            "Cutout. Set CUTOUT to 0, or AUGMENT to pad_crop."
        )


def in_memory(cfg: CfgNode) -> bool:
    """Whether the config's images are small ones, of which whole data sets are kept in memory."""
    return cfg.INPUT.CLASSIFICATION.AUGMENT == "pad_crop"


def find_dataset(name: str) -> str:
    """The absolute path of a data set, which is there or below ``$DETECTRON2_DATASETS``."""
    if not isinstance(name, str):
        raise UserError(f"DATASETS.TRAIN and DATASETS.TEST hold paths and names, found {name!r}.")
    if is_remote(name):
        return name
    cifar = cifar_name(name)
    name = NAMES.get(name, name)
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    places = [os.path.abspath(os.path.expanduser(place)) for place in (name, f"{root}/{name}")]
    for place in places:
        # The last part of a path can be a pattern of shards.
        if os.path.exists(place) or ("*" in name and os.path.isdir(os.path.dirname(place))):
            return place
    if cifar is not None:
        remedy = f"Run python datasets/prepare_cifar.py --download {cifar}, or correct the path"
    else:
        remedy = (
            "Name a folder of shards, an official distribution of Places365 or CIFAR, or a folder "
            "with one folder per class"
        )
    raise UserError(
        f"There is no data set {name}: looked for {' and '.join(dict.fromkeys(places))}. {remedy}; "
        "datasets/README.md has the layouts, and $DETECTRON2_DATASETS is the root of all data."
    )


def open_train_dataset(cfg: CfgNode) -> ClassificationDataset | ImageArrays:
    """The data set to train on."""
    # Of Places365's own folder, training takes the smaller train split; the folder of images says
    # which where the other one is meant.
    return _open(cfg, cfg.DATASETS.TRAIN[0], "train" if in_memory(cfg) else "train_standard")


def open_test_dataset(cfg: CfgNode, name: str) -> ClassificationDataset | ImageArrays:
    """A data set to evaluate on."""
    return _open(cfg, name, "test" if in_memory(cfg) else "val")


def inference_dir(cfg: CfgNode, name: str) -> str:
    """Where the predictions on a data set of ``DATASETS.TEST`` go, below the output folder."""
    last = re.sub(r"[^\w-]+", "_", name.rstrip("/").rpartition("/")[2])
    place = list(cfg.DATASETS.TEST).index(name)
    return os.path.join("inference", last if len(cfg.DATASETS.TEST) == 1 else f"{place}_{last}")


def _open(cfg: CfgNode, name: str, split: str) -> ClassificationDataset | ImageArrays:
    classes = tuple(cfg.DATASETS.CLASSES)
    try:
        return _open_once(name, split, classes, cfg.DATALOADER.CACHE_DIR, in_memory(cfg))
    except UserError as error:
        known = "" if not cfg.DATASETS.CLASSES else (
            " (The expected classes are DATASETS.CLASSES of the config, or those of "
            "DATASETS.TRAIN.)"
        )  # fmt: skip
        raise UserError(f"The data set {name}: {error}{known}") from error


# Listing a million files takes a while, and a run opens its data for checks, epochs and loaders.
@functools.lru_cache(maxsize=8)
def _open_once(
    name: str, split: str, classes: tuple[str, ...], cache_dir: str, whole: bool
) -> ClassificationDataset | ImageArrays:
    open_any = open_cifar if whole else open_dataset
    if is_prepared(name) and not whole:
        raise UserError(
            "a prepared file of small images is read with INPUT.CLASSIFICATION.AUGMENT pad_crop. "
            "Set it, and CROP, TEST_RESIZE and TEST_CROP to 32, or start from configs/base/cifar10."
        )
    return open_any(name, split=split, classes=list(classes) or None, cache_dir=cache_dir or None)


def train_transform(cfg: CfgNode) -> TrainTransform:
    """The augmentation of ``INPUT.CLASSIFICATION``."""
    options = cfg.INPUT.CLASSIFICATION
    return TrainTransform(
        size=options.CROP,
        scale=tuple(options.SCALE),
        ratio=tuple(options.RATIO),
        flip=options.FLIP,
        interpolation=options.INTERPOLATION,
        draft=options.DRAFT,
    )


def eval_transform(cfg: CfgNode) -> EvalTransform:
    """The view of an image that ``INPUT.CLASSIFICATION`` evaluates."""
    options = cfg.INPUT.CLASSIFICATION
    return EvalTransform(
        mode=options.TEST_MODE,
        resize=options.TEST_RESIZE,
        crop=options.TEST_CROP,
        interpolation=options.INTERPOLATION,
    )


def small_augment(cfg: CfgNode) -> CifarAugment:
    """The augmentation of ``INPUT.CLASSIFICATION`` with ``AUGMENT`` "pad_crop"."""
    options = cfg.INPUT.CLASSIFICATION
    return CifarAugment(
        flip=options.FLIP, pad=options.PAD, padding=options.PADDING, cutout=options.CUTOUT
    )


def train_loader(
    cfg: CfgNode, seed: int, start_iter: int = 0
) -> ClassificationLoader | CifarTrainLoader:
    """The loader of this process, from an iteration on; the seed is that of the run."""
    samplers = SAMPLERS[:1] if in_memory(cfg) else SAMPLERS
    if cfg.DATALOADER.SAMPLER_TRAIN not in samplers:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}, expected one of "
            f"{', '.join(samplers)} for a classifier"
            f"{' with INPUT.CLASSIFICATION.AUGMENT pad_crop' if in_memory(cfg) else ''}."
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
        return CifarTrainLoader(dataset, augment=augment, device=cfg.MODEL.DEVICE, **share)
    return build_classification_train_loader(
        dataset,
        **share,
        transform=train_transform(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        class_aware=cfg.DATALOADER.SAMPLER_TRAIN == "ClassAwareSampler",
        shuffle_block=cfg.DATALOADER.SHUFFLE_BLOCK,
        max_skip_ratio=cfg.DATALOADER.MAX_SKIP_RATIO,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )


def test_loader(cfg: CfgNode, name: str) -> ClassificationLoader | CifarEvalLoader:
    """The loader of this process over its share of a data set."""
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
