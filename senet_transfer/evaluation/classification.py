"""One pass of a classifier over labelled images, and what there is to say of it."""

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.errors import UserError
from senet_transfer.evaluation.evaluator import TOP, ClassificationEvaluator
from senet_transfer.models.image_classifier import ImageClassifier
from senet_transfer.utils.progress import progress

_SHOWN = 10


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        images: how many were seen.
        top1_error: in percent.
        top5_error: in percent.
        seconds: that the pass took.
        waited: seconds of these, for images that had not been read and decoded yet.
        classes: names, the label being the position.
        confusion: ``(C, C)`` images by label and prediction.
        predictions: a row an image, in the order of the data, where they were asked for.
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
        """The classes with images whose top-1 error, in percent, is highest."""
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
        """The pairs of a class and another that its images are most often taken for."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        number = int((wrong > 0).sum())
        order = wrong.flatten().argsort(descending=True, stable=True)[: min(count, number)]
        return [
            {
                "class": self.classes[place // len(self.classes)],
                "taken_for": self.classes[place % len(self.classes)],
                "images": int(wrong.view(-1)[place]),
            }
            for place in order.tolist()
        ]

    def summary(self) -> dict[str, Any]:
        """What goes into a JSON."""
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
        """Writes a row an image: key, label, its name, the best classes, logits if kept.

        Raises:
            UserError: the file can't be written.
        """
        top = min(TOP, len(self.classes))
        header = ["key", "label", "class", *(f"top{place}" for place in range(1, top + 1))]
        if self.predictions and "logits" in self.predictions[0]:
            header += [f"logit{label}" for label in range(len(self.classes))]
        try:
            with open(path, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(header)
                for row in self.predictions:
                    # Nine digits give a float32 back to the last bit.
                    logits = [f"{value:.9g}" for value in row.get("logits", ())]
                    label = row["label"]
                    best = [row["key"], label, self.classes[label], *row["top"]]
                    writer.writerow(best + logits)
        except OSError as error:
            raise UserError(f"The predictions {path} can't be written: {error}.") from error


def evaluate_classifier(
    model: ImageClassifier,
    dataset: ClassificationDataset | ImageArrays,
    transform: EvalTransform,
    *,
    batch_size: int = 32,
    workers: int = 0,
    keep_predictions: bool = False,
    keep_logits: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Evaluates on all images of a data set, in this process.

    Args:
        model: on the device to run on.
        dataset: of as many classes as the model has.
        transform: the view of an image that is scored.
        batch_size: images a batch.
        workers: processes that read and decode.
        keep_predictions: return the best classes of each image, too.
        keep_logits: as well as its logits.
        quiet: no progress bar; there is none either where stderr is no terminal.

    Raises:
        UserError: the model has another number of classes; an image is missing or broken.
    """
    _check_classes(model, dataset)
    loader = _loader(model, dataset, transform, batch_size, workers)
    evaluator = ClassificationEvaluator(
        dataset.num_classes,
        len(dataset),
        keep_predictions=keep_predictions,
        keep_logits=keep_logits,
    )
    shown = _Shown(loader, len(dataset), quiet)
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


def _check_classes(model: ImageClassifier, dataset: ClassificationDataset | ImageArrays) -> None:
    has = model.linear.out_features
    if has != dataset.num_classes:
        raise UserError(
            f"The model tells {has} classes apart, and {dataset.origin} has "
            f"{dataset.num_classes}. Evaluate it on data of the classes it was trained on."
        )


def _loader(
    model: ImageClassifier,
    dataset: ClassificationDataset | ImageArrays,
    transform: EvalTransform,
    batch_size: int,
    workers: int,
) -> ClassificationLoader | CifarEvalLoader:
    if isinstance(dataset, ImageArrays):
        _check_view(dataset, transform)
        return CifarEvalLoader(dataset, batch_size=batch_size, device=model.device)
    return build_classification_eval_loader(
        dataset,
        batch_size=batch_size,
        transform=transform,
        num_workers=workers,
        pin_memory=model.device.type == "cuda",
    )


def _check_view(data: ImageArrays, transform: EvalTransform) -> None:
    if transform.output_shape != (3, SIDE, SIDE) or transform.resize != SIDE:
        raise UserError(
            f"{data.origin} holds images of {SIDE}x{SIDE} pixels, and the view to evaluate is "
            f"{transform.mode} to {transform.resize} and {transform.crop} pixels. Evaluate it with "
            "a network for such images, without --resize, --crop and --crop-mode."
        )


class _Shown:
    """A loader with a progress bar that counts images, and a clock of what it takes."""

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
