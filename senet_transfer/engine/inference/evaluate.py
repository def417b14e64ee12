"""Evaluation of a classifier, from loading the model to writing the results."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from senet_transfer.config import is_classification
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import eval_transform, find_dataset, in_memory, warn_of_dataset
from senet_transfer.data.cifar.in_memory import ImageArrays
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.multi_scale import MultiScaleTransform, ViewOptions, views_record
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.data.reading import reading_of
from senet_transfer.engine.inference.ensembles import check_same_classes, has_caffe_order
from senet_transfer.engine.inference.saved_logits import evaluate_saved_logits
from senet_transfer.engine.model_from import LoadedModel, ModelSource
from senet_transfer.engine.results import write_results
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification import Evaluation, evaluate_classifier
from senet_transfer.evaluation.paper_results import (
    IMAGENET,
    LARGE_CROPS,
    Published,
    published_on_cifar,
    published_on_imagenet,
)
from senet_transfer.models.averaged import AveragedClassifier
from senet_transfer.models.build import backbone_name
from senet_transfer.models.dense import DenseClassifier


def run_evaluation(
    sources: Sequence[ModelSource],
    *,
    device: str = "",
    data: str = "",
    views: ViewOptions | None = None,
    batch_size: int = 32,
    workers: int = 2,
    output: str = "",
    predictions: str = "",
    keep_logits: bool = False,
    published: Sequence[Published] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a classifier, or the mean of several classifiers' probabilities.

    Args:
        sources: The classifiers, which must have the same classes in the same order.
        device: The device, such as "cuda:1". If empty, ``MODEL.DEVICE`` is used.
        data: The evaluation data: shards, a folder, a CSV file or an archive. If empty, the first
            dataset in ``DATASETS.TEST`` is used.
        views: The scales and crops to evaluate for each image. If None, the model's defaults are
            used.
        batch_size: The number of images per batch.
        workers: The number of processes that read and decode images.
        output: The path of the JSON file to write. If empty, no JSON file is written.
        predictions: The path of the CSV file to write, with a unique key, the label, the
            most probable classes and the path of each image. If empty, no CSV file is written.
        keep_logits: If True, add the logits to the CSV file. For several classifiers, these are the
            logarithms of the mean probabilities.
        published: Published results on the same data to include in the output. If empty, the
            known results of this network are included.
        quiet: If True, show no progress bar.

    Returns:
        The results, which are also written to ``output``.

    Raises:
        UserError: If a file is missing or does not match the other files, or if a value is invalid.
    """
    _check_files(output, predictions, keep_logits=keep_logits)
    for found in sources:
        _check(found)
    sources = [found.examined() for found in sources]
    check_same_classes(sources)
    dataset = _open_data(sources, data)
    _check_order(sources, dataset)
    loaded = [_with_classes(found, dataset.num_classes).build(device) for found in sources]
    transform = _common_transform(loaded, views or ViewOptions())
    models = [one.model for one in loaded]
    if isinstance(transform, MultiScaleTransform) and transform.dense:
        models = [DenseClassifier(model) for model in models]
    evaluation = evaluate_classifier(
        models[0] if len(models) == 1 else AveragedClassifier(models).eval(),
        dataset,
        transform,
        batch_size=batch_size,
        workers=workers,
        keep_predictions=bool(predictions),
        keep_logits=keep_logits,
        quiet=quiet,
    )
    if len(loaded) == 1:
        published = published or _published(evaluation, dataset.origin, loaded[0], transform)
    names = [
        backbone_name(one.cfg) if one.cfg.MODEL.BACKBONE.ARCH else found.config_file
        for one, found in zip(loaded, sources, strict=True)
    ]
    weights = [one.cfg.MODEL.WEIGHTS for one in loaded]
    results = {
        **evaluation.summary(),
        "model": " + ".join(names),
        "weights": weights[0] if len(weights) == 1 else weights,
        "family": " + ".join(dict.fromkeys(one.family for one in loaded)),
        "data": dataset.origin,
        **views_record(transform),
        "published": [asdict(row) for row in published],
    }
    return _written(evaluation, results, output, predictions)


def _check_order(
    sources: Sequence[ModelSource], dataset: ClassificationDataset | ImageArrays
) -> None:
    """Raise a UserError if the labels use ImageNet's usual class order but the outputs do not."""
    names = list(dataset.classes)
    if all(re.fullmatch(r"n\d{8}", name) for name in names) and names == sorted(names):
        for found in filter(has_caffe_order, sources):
            raise UserError(
                f"The outputs of {found.cfg.MODEL.WEIGHTS} have the class order of ImageNet's "
                f"development kit, but the classes of {dataset.origin} are sorted by WordNet id. "
                "Evaluate Cadene's conversion of the network, such as cadene/se_resnet50, or set "
                "--data to a CSV file with the development kit's labels."
            )


def run_saved_evaluation(
    files: Sequence[str],
    *,
    output: str = "",
    predictions: str = "",
    keep_logits: bool = False,
    published: Sequence[Published] = (),
) -> dict[str, Any]:
    """Evaluate an ensemble: average the class probabilities from several files with logits.

    Args:
        files: CSV files with logits, from which the probabilities are computed; see
            :func:`~.saved_logits.evaluate_saved_logits`.
        output: The path of the JSON file to write. If empty, no JSON file is written.
        predictions: The path of the CSV file to write; see :func:`run_evaluation`.
        keep_logits: If True, add the logarithm of the mean probabilities to ``predictions``.
        published: Published results on the same data to include in the output.

    Returns:
        The results, which are also written to ``output``.
    """
    _check_files(output, predictions, keep_logits=keep_logits)
    evaluation = evaluate_saved_logits(
        files, keep_predictions=bool(predictions), keep_logits=keep_logits
    )
    results = {
        **evaluation.summary(),
        "model": " + ".join(Path(file).stem for file in files),
        "saved_logits": list(files),
        "published": [asdict(row) for row in published],
    }
    return _written(evaluation, results, output, predictions)


def _written(
    evaluation: Evaluation, results: dict[str, Any], output: str, predictions: str
) -> dict[str, Any]:
    """Write the JSON and CSV files that were requested, and return the results."""
    if predictions:
        evaluation.write_predictions(predictions)
    if output:
        write_results(output, results)
    return results


def _common_transform(
    loaded: Sequence[LoadedModel], views: ViewOptions
) -> EvalTransform | MultiScaleTransform:
    """Return the evaluation transform, which must be the same for all models.

    Raises:
        UserError: If the models require different transforms.
    """
    found = [views.transform(eval_transform(one.cfg)) for one in loaded]
    for one, transform in zip(loaded, found, strict=True):
        if transform != found[0]:
            first, other = views_record(found[0])["view"], views_record(transform)["view"]
            differing = [
                f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other[key]
            ]
            raise UserError(
                f"The preprocessing of {loaded[0].cfg.MODEL.WEIGHTS} and {one.cfg.MODEL.WEIGHTS} "
                f"differs: {', '.join(differing)}. Models that are evaluated together must have "
                "the same preprocessing. Set --scales, --crop and --crop-mode for all models, or "
                "evaluate each model with --predictions and --logits, and average the files with "
                "--saved-logits."
            )
    return found[0]


def _check_files(output: str, predictions: str, *, keep_logits: bool) -> None:
    """Raise a UserError before the evaluation if its results can't be written."""
    for path in (output, predictions):
        _check_writable(path)
    if keep_logits and not predictions:
        raise UserError(
            "--logits requires --predictions, because the logits are written to its CSV file. Pass "
            "--predictions FILE as well."
        )


def _check_writable(path: str) -> None:
    """Raise a UserError if a file can't be written."""
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
            "detector, pass its weights with --weights, or use `senet train --eval-only`."
        )
    if not found.cfg.MODEL.WEIGHTS:
        raise UserError(
            "There are no weights to evaluate: neither --weights nor MODEL.WEIGHTS is set. Pass "
            "--weights or, with --config-file, set MODEL.WEIGHTS."
        )


def _with_classes(found: ModelSource, count: int) -> ModelSource:
    """Return a copy of a model source whose config sets the number of classes to ``count``."""
    cfg = found.cfg.clone()
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = count
    return replace(found, cfg=cfg)


def _open_data(sources: Sequence[ModelSource], data: str) -> ClassificationDataset | ImageArrays:
    """Open the evaluation data. Labels follow the class order of the weights if it is known."""
    cfg = sources[0].cfg
    if not data and not cfg.DATASETS.TEST:
        raise UserError("There is no evaluation data: DATASETS.TEST is empty. Pass --data.")
    path = find_dataset(data or cfg.DATASETS.TEST[0])
    names = (list(found.cfg.DATASETS.CLASSES) for found in sources)
    classes = next((found for found in names if found), None)
    cache = cfg.DATALOADER.CACHE_DIR or None
    if in_memory(cfg):
        reading = reading_of(cfg)
        return open_cifar(path, split="test", classes=classes, cache_dir=cache, reading=reading)
    dataset = open_dataset(path, split="val", classes=classes, cache_dir=cache)
    warn_of_dataset(dataset, path, reading_of(cfg))
    return dataset


def _published(
    evaluation: Evaluation,
    origin: str,
    loaded: LoadedModel,
    transform: EvalTransform | MultiScaleTransform,
) -> tuple[Published, ...]:
    """Return published single-crop results for a network, dataset and crop size."""
    name = backbone_name(loaded.cfg)
    if not isinstance(transform, EvalTransform) or transform.mode == "ten_crop":
        return ()
    if transform.crop != loaded.preprocessing.crop:
        large = LARGE_CROPS.get((name, transform.crop)) if len(evaluation.classes) == 1000 else None
        return (large,) if large else ()
    row = published_on_cifar(origin, name)
    if not row and len(evaluation.classes) == 1000:
        row = IMAGENET.get((loaded.family, name))
    if not row and loaded.family == "senet_transfer":
        row = published_on_imagenet(evaluation.classes, name)
    return (row,) if row else ()
