"""The evaluation of a classifier from the files of model and data to the files of results."""

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
        found: the classifier.
        device: empty for a GPU if there is one.
        data: shards, a folder or an archive; empty for the first of ``DATASETS.TEST``.
        mode: one of ``EVAL_MODES``; empty for the config's.
        resize: in pixels; None for the model's.
        crop: in pixels; None for the model's.
        batch_size: images per batch.
        workers: processes that read and decode.
        output: the JSON to write, or empty.
        predictions: the CSV to write, or empty: key, label and the best classes of each image.
        keep_logits: add the logits to the CSV.
        published: results of others on the same data; by default those known of this network.
        quiet: no progress bar.

    Returns:
        The content of ``output``.

    Raises:
        UserError: a file is missing or does not fit the others; a value is invalid.
    """
    for path in (output, predictions):
        _check_writable(path)
    if keep_logits and not predictions:
        raise UserError("--logits go into the CSV of --predictions, which is not given.")
    _check(found)
    dataset = _open_data(found.cfg, data)
    loaded = _with_classes(found, dataset.num_classes).build(device)
    view = loaded.preprocessing
    transform = EvalTransform(
        mode=mode or loaded.cfg.INPUT.CLASSIFICATION.TEST_MODE,
        resize=view.resize if resize is None else resize,
        crop=view.crop if crop is None else crop,
        interpolation=view.interpolation,
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
    """Raise UserError, before the evaluation, if its results can't be written."""
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Choose another path.") from error
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise UserError(f"{path} can't be written: it is a folder, or in one that is read-only.")


def _check(found: ModelSource) -> None:
    """Raise UserError if the model is not a classifier with weights."""
    if not is_classification(found.cfg):
        raise UserError(
            f"{found.config_file} is of a {found.cfg.MODEL.META_ARCHITECTURE}, expected a "
            "classifier (MODEL.META_ARCHITECTURE ImageClassifier). tools/train_net.py --eval-only "
            "evaluates detectors."
        )
    if not found.cfg.MODEL.WEIGHTS:
        raise UserError(
            "Neither --weights nor MODEL.WEIGHTS names a weight file, and random weights are not "
            "worth evaluating: --model needs --weights, a config at least one of the two."
        )


def _with_classes(found: ModelSource, count: int) -> ModelSource:
    """Return the same with a number of classes, which the weights then have to fit."""
    cfg = found.cfg.clone()
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = count
    return replace(found, cfg=cfg)


def _open_data(cfg: CfgNode, data: str) -> ClassificationDataset | ImageArrays:
    if not data and not cfg.DATASETS.TEST:
        raise UserError("There is no data to evaluate on. Name it with --data.")
    path = find_dataset(data or cfg.DATASETS.TEST[0])
    classes = list(cfg.DATASETS.CLASSES) or None
    cache = cfg.DATALOADER.CACHE_DIR or None
    if in_memory(cfg):
        return open_cifar(path, split="test", classes=classes, cache_dir=cache)
    return open_dataset(path, split="val", classes=classes, cache_dir=cache)


def _published(
    evaluation: Evaluation, origin: str, name: str, family: str
) -> tuple[Published, ...]:
    """Return what others have published of this network on this data."""
    row = published_on_cifar(origin, name)
    if not row and len(evaluation.classes) == 1000:
        row = IMAGENET.get((family, name))
    return (row,) if row else ()
