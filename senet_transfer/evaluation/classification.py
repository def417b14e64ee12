"""Evaluation of classifiers: error rates, confusion matrix and predictions."""

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import inference_on_dataset
from torch import Tensor

from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.cifar.in_memory import SIDE, ImageArrays
from senet_transfer.data.cifar.loader import CifarEvalLoader
from senet_transfer.data.classification.loader import (
    Batch,
    ClassificationLoader,
    build_classification_eval_loader,
)
from senet_transfer.data.images.multi_scale import MultiScaleTransform, views_record
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification_evaluator import TOP, ClassificationEvaluator
from senet_transfer.models.averaged import AveragedClassifier
from senet_transfer.models.dense import DenseClassifier
from senet_transfer.models.image_classifier import ImageClassifier
from senet_transfer.utils.atomic_io import atomic_path
from senet_transfer.utils.progress import progress

_SHOWN = 10

EvaluatedModel = ImageClassifier | DenseClassifier | AveragedClassifier
Transform = EvalTransform | MultiScaleTransform


@dataclass(frozen=True)
class Evaluation:
    """Results of a classifier evaluation.

    Attributes:
        images: Number of images.
        top1_error: Top-1 error in percent.
        top5_error: Top-5 error in percent.
        seconds: Duration of the evaluation in seconds.
        waited: Time spent waiting for the data loader, in seconds.
        classes: Class names, indexed by label.
        confusion: Confusion matrix with the number of images by label and prediction, ``(C, C)``.
        predictions: One row per image, in the order of the data. Empty unless requested.
    """

    images: int
    top1_error: float
    top5_error: float
    seconds: float
    waited: float
    classes: list[str]
    confusion: Tensor
    predictions: list[dict[str, Any]]

    def worst_classes(self, count: int = _SHOWN) -> list[dict[str, Any]]:
        """Return the ``count`` classes with the highest top-1 error (in percent)."""
        totals = self.confusion.sum(1)
        found: list[dict[str, Any]] = [
            {
                "class": name,
                "images": int(totals[label]),
                "top1_error": 100 * (1 - int(self.confusion[label, label]) / int(totals[label])),
            }
            for label, name in enumerate(self.classes)
            if totals[label]
        ]
        return sorted(found, key=lambda row: (-row["top1_error"], row["class"]))[:count]

    def most_confused(self, count: int = _SHOWN) -> list[dict[str, Any]]:
        """Return the ``count`` most frequently confused pairs of classes."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        number = int((wrong > 0).sum())
        order = wrong.flatten().argsort(descending=True, stable=True)[: min(count, number)]
        return [
            {
                "class": self.classes[place // len(self.classes)],
                "predicted": self.classes[place % len(self.classes)],
                "images": int(wrong.view(-1)[place]),
            }
            for place in order.tolist()
        ]

    def summary(self) -> dict[str, Any]:
        """Return the results as a JSON-serialisable dict."""
        return {
            "images": self.images,
            "top1_error": self.top1_error,
            "top5_error": self.top5_error,
            "images_per_second": round(self.images / self.seconds, 2),
            "share_of_time_waiting_for_images": round(self.waited / self.seconds, 4),
            "num_classes": len(self.classes),
            "worst_classes": self.worst_classes(),
            "most_confused": self.most_confused(),
        }

    def write_predictions(self, path: str) -> None:
        """Write a CSV file with one row per image: key, label, class name, top classes and path.

        Logits are also written if they were kept. The encoding is UTF-8. Bytes of paths that are
        not valid UTF-8 are written unchanged.

        Raises:
            UserError: If the file can't be written.
        """
        top = min(TOP, len(self.classes))
        header = ["key", "label", "class", *(f"top{place}" for place in range(1, top + 1))]
        if self.predictions and "logits" in self.predictions[0]:
            header += [f"logit{label}" for label in range(len(self.classes))]
        header.append("path")
        try:
            with (
                atomic_path(Path(path)) as partial,
                open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                writer = csv.writer(file)
                writer.writerow(header)
                for row in self.predictions:
                    # Nine digits represent a float32 exactly.
                    logits = [f"{value:.9g}" for value in row.get("logits", ())]
                    label = row["label"]
                    best = [row["key"], label, self.classes[label], *row["top"]]
                    writer.writerow([*best, *logits, row["path"]])
        except OSError as error:
            raise UserError(
                f"Cannot write predictions to {path}: {error}. Free up space or choose another "
                "folder."
            ) from error


def evaluate_classifier(
    model: EvaluatedModel,
    dataset: ClassificationDataset | ImageArrays,
    transform: Transform,
    *,
    batch_size: int = 32,
    workers: int = 0,
    keep_predictions: bool = False,
    keep_logits: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate a classifier on all images of a dataset, in a single process.

    Args:
        model: The classifier, on the device to use.
        dataset: A dataset with the same number of classes as the model.
        transform: The evaluation transform.
        batch_size: The number of images per batch.
        workers: The number of processes that read and decode images.
        keep_predictions: If True, return the top classes of each image.
        keep_logits: If True, return the logits and top classes of each image.
        quiet: If True, show no progress bar. The bar is also hidden if stderr isn't a terminal.

    Raises:
        UserError: If the model and the dataset have different numbers of classes, or if an image
            is missing or corrupted.
    """
    _check_classes(model, dataset)
    evaluator = ClassificationEvaluator(
        dataset.num_classes,
        len(dataset),
        keep_predictions=keep_predictions,
        keep_logits=keep_logits,
    )
    shown = eval_batches(model, dataset, transform, batch_size, workers, quiet)
    start = time.perf_counter()
    with torch.inference_mode():
        results = inference_on_dataset(model, shown, evaluator)
    return Evaluation(
        **results["classification"],
        seconds=time.perf_counter() - start,
        waited=shown.waited,
        classes=list(dataset.classes),
        confusion=evaluator.confusion,
        predictions=evaluator.predictions,
    )


def _check_classes(model: EvaluatedModel, dataset: ClassificationDataset | ImageArrays) -> None:
    has = model.num_classes
    if has != dataset.num_classes:
        raise UserError(
            f"The model has {has} classes, but {dataset.origin} has {dataset.num_classes}. "
            "Evaluate the model on data with the same classes as the training data."
        )


def eval_batches(
    model: EvaluatedModel,
    dataset: ClassificationDataset | ImageArrays,
    transform: Transform,
    batch_size: int,
    workers: int,
    quiet: bool,
) -> "ShownBatches":
    """Return an evaluation loader that shows a progress bar."""
    loader: ClassificationLoader | CifarEvalLoader
    if isinstance(dataset, ImageArrays):
        _check_view(dataset, transform)
        loader = CifarEvalLoader(dataset, batch_size=batch_size, device=model.device)
    else:
        loader = build_classification_eval_loader(
            dataset,
            batch_size=batch_size,
            transform=transform,
            num_workers=workers,
            pin_memory=model.device.type == "cuda",
        )
    return ShownBatches(loader, len(dataset), quiet)


def _check_view(data: ImageArrays, transform: Transform) -> None:
    view = views_record(transform)
    if transform.output_shape != (3, SIDE, SIDE) or view["scales"] != [SIDE]:
        raise UserError(
            f"{data.origin} contains images of {SIDE}x{SIDE} pixels, but the evaluation resizes to "
            f"{view['scales']} and takes {view['crops']} crops of {view['view']['crop']} pixels "
            f"({view['view']['mode']}). Use a network for images of this size, and omit --resize, "
            "--scales, --crop, --crops, --crop-mode and --dense."
        )


class ShownBatches:
    """Data loader wrapper that shows a progress bar and measures the data loading time."""

    def __init__(self, loader: ClassificationLoader | CifarEvalLoader, images: int, quiet: bool):
        self.loader = loader
        self.images = images
        self.quiet = quiet
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        with progress(total=self.images, unit="image", quiet=self.quiet) as bar:
            asked = time.perf_counter()
            for batch in self.loader:
                self.waited += time.perf_counter() - asked
                yield batch
                bar.update(len(batch["key"]))
                asked = time.perf_counter()
