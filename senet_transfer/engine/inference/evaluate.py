"""Evaluation of a classifier, from loading the model to writing the results."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from detectron2.config import CfgNode

from senet_transfer.config import is_classification
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import find_dataset, in_memory
from senet_transfer.data.cifar.in_memory import ImageArrays
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.reading import reading_of
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.model_from import ModelSource
from senet_transfer.engine.results import write_results
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification import Evaluation, evaluate_classifier
from senet_transfer.evaluation.paper_results import IMAGENET, Published, published_on_cifar
from senet_transfer.models.build import backbone_name


def run_evaluation(
    found: ModelSource,
    *,
    device: str = "",
    data: str = "",
    mode: str = "",
    resize: int | None = None,
    crop: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    output: str = "",
    predictions: str = "",
    keep_logits: bool = False,
    published: Sequence[Published] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a classifier and write the results.

    Args:
        found: The classifier.
        device: The device, such as "cuda:1". If empty, ``MODEL.DEVICE`` is used.
        data: The path of shards, a folder or an archive. If empty, the first data set in
            ``DATASETS.TEST`` is used.
        mode: The evaluation mode, one of ``EVAL_MODES``. If empty, the config's mode is used.
        resize: The resize size in pixels. If None, the model's size is used.
        crop: The crop size in pixels. If None, the model's size is used.
        batch_size: The number of images per batch.
        workers: The number of processes that read and decode images.
        output: The path of the JSON file to write. If empty, no JSON file is written.
        predictions: The path of the CSV file to write, with the key, the label, the most
            probable classes and the path of each image. If empty, no CSV file is written.
        keep_logits: If True, add the logits to the CSV file.
        published: Published results on the same data to include in the output. If empty, the
            known results of this network are included.
        quiet: If True, show no progress bar.

    Returns:
        The results, which are also written to ``output``.

    Raises:
        UserError: If a file is missing or does not match the other files, or if a value is invalid.
    """
    for path in (output, predictions):
        _check_writable(path)
    if keep_logits and not predictions:
        raise UserError("--logits requires --predictions, the CSV file for the logits.")
    _check(found)
    found = found.examined()
    dataset = _open_data(found.cfg, data)
    loaded = _with_classes(found, dataset.num_classes).build(device)
    view = loaded.preprocessing
    transform = EvalTransform(
        mode=mode or loaded.cfg.INPUT.CLASSIFICATION.TEST_MODE,
        resize=view.resize if resize is None else resize,
        crop=view.crop if crop is None else crop,
        interpolation=view.interpolation,
        reading=reading_of(loaded.cfg),
    )
    evaluation = evaluate_classifier(
        loaded.model,
        dataset,
        transform,
        batch_size=batch_size,
        workers=workers,
        keep_predictions=bool(predictions),
        keep_logits=keep_logits,
        quiet=quiet,
    )
    name = backbone_name(loaded.cfg)
    published = published or _published(evaluation, dataset.origin, name, loaded.family)
    results = {
        **evaluation.summary(),
        "model": name if loaded.cfg.MODEL.BACKBONE.ARCH else found.config_file,
        "weights": loaded.cfg.MODEL.WEIGHTS,
        "family": loaded.family,
        "data": dataset.origin,
        "view": asdict(transform),
        "published": [asdict(row) for row in published],
    }
    if predictions:
        evaluation.write_predictions(predictions)
    if output:
        write_results(output, results)
    return results


def _check_writable(path: str) -> None:
    """Raise a UserError before the evaluation if its results can't be written."""
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Choose a different path.") from error
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise UserError(
            f"{path} can't be written: it is a folder, or its parent folder is read-only. Choose a "
            "different path."
        )


def _check(found: ModelSource) -> None:
    """Raise a UserError if the model is not a classifier with weights."""
    if not is_classification(found.cfg):
        raise UserError(
            f"MODEL.META_ARCHITECTURE in {found.config_file} is "
            f"{found.cfg.MODEL.META_ARCHITECTURE}; expected ImageClassifier. To evaluate a "
            "detector, use tools/train_net.py --eval-only."
        )
    if not found.cfg.MODEL.WEIGHTS:
        raise UserError(
            "There are no weights to evaluate: neither --weights nor MODEL.WEIGHTS is set. Give "
            "--weights or, with --config-file, set MODEL.WEIGHTS."
        )


def _with_classes(found: ModelSource, count: int) -> ModelSource:
    """Return a copy of the model source with a different number of classes."""
    cfg = found.cfg.clone()
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = count
    return replace(found, cfg=cfg)


def _open_data(cfg: CfgNode, data: str) -> ClassificationDataset | ImageArrays:
    if not data and not cfg.DATASETS.TEST:
        raise UserError("There is no evaluation data: DATASETS.TEST is empty. Give --data.")
    path = find_dataset(data or cfg.DATASETS.TEST[0])
    classes = list(cfg.DATASETS.CLASSES) or None
    cache = cfg.DATALOADER.CACHE_DIR or None
    if in_memory(cfg):
        reading = reading_of(cfg)
        return open_cifar(path, split="test", classes=classes, cache_dir=cache, reading=reading)
    return open_dataset(path, split="val", classes=classes, cache_dir=cache)


def _published(
    evaluation: Evaluation, origin: str, name: str, family: str
) -> tuple[Published, ...]:
    """Return published results for this network on this data."""
    row = published_on_cifar(origin, name)
    if not row and len(evaluation.classes) == 1000:
        row = IMAGENET.get((family, name))
    return (row,) if row else ()
