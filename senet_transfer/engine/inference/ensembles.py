"""Ensembles: several models whose predictions are combined."""

from collections.abc import Sequence
from dataclasses import replace

from senet_transfer.config import is_classification
from senet_transfer.config.architectures import box_head
from senet_transfer.engine.checkpoints.classes import config_next_to
from senet_transfer.engine.inference.fused_detector import FusedDetector
from senet_transfer.engine.model_from import LoadedModel, ModelSource, find_model
from senet_transfer.engine.run_checks import check_augmentation
from senet_transfer.errors import UserError


def check_same_classes(sources: Sequence[ModelSource]) -> None:
    """Check that the outputs of several models have the same classes in the same order.

    Args:
        sources: Model sources returned by :meth:`~.model_from.ModelSource.examined`.

    Raises:
        UserError: If the number, the names or the order of the classes differ.
    """
    # The class names of some published files are not known.
    first = next((found for found in sources if found.cfg.DATASETS.CLASSES), sources[0])
    for other in sources:
        files = f"{first.cfg.MODEL.WEIGHTS} and {other.cfg.MODEL.WEIGHTS}"
        counts = _class_count(first), _class_count(other)
        if counts[0] != counts[1]:
            raise UserError(
                f"{files} have {counts[0]} and {counts[1]} classes; expected the same number of "
                "classes. Combine only models that were trained on the same data."
            )
        if has_caffe_order(first) != has_caffe_order(other):
            raise UserError(
                f"The class orders of {files} differ: only one of the models is a Caffe model with "
                "the class order of ImageNet's development kit. Combine only models with the same "
                "class order."
            )
        names = list(first.cfg.DATASETS.CLASSES), list(other.cfg.DATASETS.CLASSES)
        if not all(names) or names[0] == names[1]:
            continue
        pairs = enumerate(zip(*names, strict=False))
        index = next((i for i, pair in pairs if pair[0] != pair[1]), 0)
        problem = "class orders" if set(names[0]) == set(names[1]) else "classes"
        raise UserError(
            f"The {problem} of {files} differ: class {index} is {names[0][index]} in the first "
            f"model and {names[1][index]} in the second. Combine only models that were trained on "
            "the same classes in the same order."
        )


def _class_count(found: ModelSource) -> int:
    if not is_classification(found.cfg):
        return len(found.cfg.DATASETS.CLASSES) or box_head(found.cfg).NUM_CLASSES
    return (found.source and found.source.num_classes) or found.cfg.MODEL.CLASSIFIER.NUM_CLASSES


def has_caffe_order(found: ModelSource) -> bool:
    """Return whether a model uses the ImageNet class order of the SENet authors' Caffe models."""
    published = found.source is not None and found.source.family.name == "caffe"
    return published and not found.cfg.DATASETS.CLASSES and _class_count(found) == 1000


def build_detectors(source: ModelSource, device: str = "") -> LoadedModel:
    """Build a model or, if ``TEST.ENSEMBLE.WEIGHTS`` is set, an ensemble of several detectors.

    Args:
        source: The config and weights of the model, or of the ensemble's first detector.
        device: The device to run on. If empty, ``MODEL.DEVICE`` is used.

    Raises:
        UserError: If the detectors' classes or image formats differ, or if a detector predicts
            anything other than boxes.
    """
    cfg = source.cfg
    if not cfg.TEST.ENSEMBLE.WEIGHTS:
        return source.build(device)
    sources = [source.examined()]
    for weights in cfg.TEST.ENSEMBLE.WEIGHTS:
        if config_next_to(weights):
            found = find_model(weights=weights)
        else:
            other = cfg.clone()
            other.defrost()
            other.MODEL.WEIGHTS = weights
            found = ModelSource(other)
        found.cfg.TEST.ENSEMBLE.WEIGHTS = cfg.TEST.ENSEMBLE.WEIGHTS
        check_augmentation(found.cfg)
        if found.cfg.INPUT.FORMAT != cfg.INPUT.FORMAT:
            raise UserError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT} for {cfg.MODEL.WEIGHTS} and "
                f"{found.cfg.INPUT.FORMAT} for {weights}; expected the same format, because all "
                "detectors receive the same images. Combine only detectors with the same format."
            )
        sources.append(found.examined())
    check_same_classes(sources)
    models = [found.build(device or cfg.MODEL.DEVICE) for found in sources]
    return replace(models[0], model=FusedDetector(cfg, [found.model for found in models]))
