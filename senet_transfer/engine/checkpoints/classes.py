"""Comparison of a trained model's class names with the class names of datasets."""

import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode

from senet_transfer.config import is_classification
from senet_transfer.config.load import load_config
from senet_transfer.data import build
from senet_transfer.data.detection.dataset_checks import category_ids, use_class_order
from senet_transfer.errors import UserError
from senet_transfer.utils.text import differences, first_of
from senet_transfer.weights.hub.bundled import bundled_config
from senet_transfer.weights.hub.catalogue import names_published
from senet_transfer.weights.hub.repositories import hub_weights, is_hub_name
from senet_transfer.weights.mapping.source import Source

logger = logging.getLogger(__name__)


def config_next_to(weights: str) -> str:
    """Return the path of the ``config.yaml`` next to a checkpoint, or "" if there is none.

    If the checkpoint is in a Hugging Face Hub repository, the files are downloaded. If it is part
    of this package, the path of the config in the package is returned.
    """
    if names_published(weights):
        return bundled_config(weights)
    if is_hub_name(weights):
        weights = str(hub_weights(weights))
    path = os.path.join(os.path.dirname(weights), "config.yaml")
    return path if weights and os.path.isfile(path) else ""


def trained_classes(source: Source) -> list[str]:
    """Return a weight file's class names, in the order of the model's outputs.

    The names are read from the weight file or, if it was written before version 0.1, from the
    ``config.yaml`` next to it.

    Returns:
        The class names, or an empty list if they are unknown or the file contains only a backbone.
    """
    if source.classes:
        return list(source.classes)
    predicts = source.detector or "linear.weight" in source.tensors
    path = config_next_to(source.path)
    if source.family.name != "senet_transfer" or not predicts or not path:
        return []
    try:
        return list(load_config(path).DATASETS.CLASSES)
    except UserError:  # The config was written by another program.
        return []


def use_trained_classes(
    cfg: CfgNode, source: Source, names: Sequence[str], *, keeps: bool, eval_only: bool = False
) -> None:
    """Use the class order of a run's initial model, if the run's datasets have the same classes.

    The order can't be changed for classification data with fixed labels, such as shards. The
    evaluation data of a classifier may lack some of the classes.

    Args:
        cfg: The config, whose ``DATASETS.CLASSES`` and ``CATEGORY_IDS`` are changed in place.
        source: The weight file of the initial model.
        names: The names of the run's datasets.
        keeps: True if the model is evaluated or its training is resumed, so its classes can't
            change. False if its weights initialise a new model, which may have different classes.
        eval_only: True for a run that does not read the training data.

    Raises:
        UserError: If ``keeps`` is True, and the classes differ or their order can't be changed.
    """
    model, data = trained_classes(source), list(cfg.DATASETS.CLASSES)
    if not model or model == data:
        return
    detector = not is_classification(cfg) and use_class_order(names, model)
    if detector:
        cfg.DATASETS.CLASSES = model
        cfg.DATASETS.CATEGORY_IDS = category_ids(names[0])
    # Evaluation data may lack some of the model's classes.
    same = keeps or len(model) == len(data)
    if detector or (
        is_classification(cfg) and same and build.use_class_order(cfg, model, eval_only=eval_only)
    ):
        logger.warning(
            "The datasets list the classes stored in %s in a different order, or contain only some "
            "of these classes. The class order of the weights is used: %s.",
            source.path,
            first_of(model),
        )
        return
    found = differences(data, model)
    if keeps:
        raise UserError(
            f"The model in {source.path} was trained on classes that differ from those of the "
            f"datasets: {found}. The model's classes are {model}; the datasets' classes are "
            f"{data}. Use data with the same classes in the same order."
        )
    if len(model) == len(data):
        logger.warning(
            "%s was trained on classes that differ from those of the datasets: %s. The number of "
            "classes is the same, so the layers that predict classes are loaded from this file.",
            source.path,
            found,
        )


def apply_file_classes(cfg: CfgNode, source: Source) -> None:
    """Copy a weight file's class names, if they are known, to a config.

    Args:
        cfg: The config, which is changed in place. Classes that are already in the config keep
            their category ids.
        source: The weight file of the model.
    """
    names = trained_classes(source)
    stated = list(cfg.DATASETS.CLASSES)
    if not names or names == stated:
        return
    if stated:
        logger.warning(
            "DATASETS.CLASSES is %s, but the model was trained on the classes %s. The model's "
            "classes are used.",
            first_of(stated),
            first_of(names),
        )
    ids = dict(zip(cfg.DATASETS.CLASSES, cfg.DATASETS.CATEGORY_IDS, strict=False))
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.DATASETS.CLASSES = names
    cfg.DATASETS.CATEGORY_IDS = [ids[name] for name in names] if ids.keys() >= set(names) else []
    if frozen:
        cfg.freeze()
