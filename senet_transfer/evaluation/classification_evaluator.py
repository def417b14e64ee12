"""Detectron2 evaluator for the top-1 and top-5 errors."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file

TOP = 5


class ClassificationEvaluator(DatasetEvaluator):
    """Evaluator that counts correct predictions across all processes.

    Attributes:
        confusion: Confusion matrix, int64 ``(C, C)``: the number of images by label and prediction.
            After :meth:`evaluate`, the main process holds the sum over all processes.
        predictions: One row per image, in the order of the data. Empty unless predictions or
            logits are kept.
    """

    def __init__(
        self,
        num_classes: int,
        expected: int,
        *,
        with_loss: bool = False,
        keep_predictions: bool = False,
        keep_logits: bool = False,
        output_dir: str = "",
    ):
        """
        Args:
            num_classes: The number of classes in the model and the data.
            expected: The number of images in the dataset, for checking that all images were
                evaluated.
            with_loss: If True, compute the mean cross-entropy, without label smoothing.
            keep_predictions: If True, keep the key, label and top classes of each image.
            keep_logits: If True, also keep the logits of each image.
            output_dir: The folder for ``predictions.json``. If empty, the file isn't written. The
                file contains one list per column: ``index`` (in the dataset), ``label``, ``top``
                (the top classes) and ``probability`` (of the best class, in [0, 1]).
        """
        self.num_classes = num_classes
        self.expected = expected
        self.with_loss = with_loss
        self.output_dir = output_dir
        self.keep_predictions = keep_predictions or keep_logits or bool(output_dir)
        self.keep_logits = keep_logits
        self.reset()

    def reset(self) -> None:
        """Reset all counts."""
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        self.hits = torch.zeros(TOP, dtype=torch.int64)
        self.loss = torch.zeros((), dtype=torch.float64)
        self.predictions: list[dict[str, Any]] = []

    def process(self, inputs: dict[str, Any], outputs: Tensor) -> None:
        """Add a batch from the evaluation loader and its logits ``(N, C)`` to the counts."""
        logits, labels = outputs.float().cpu(), inputs["label"].cpu()
        if logits.shape[1] != self.num_classes:
            raise UserError(
                f"The model has {logits.shape[1]} classes, but the data has {self.num_classes}. "
                "Evaluate the model on data with the same classes as the training data."
            )
        finite = logits.isfinite().all(1)
        if not finite.all():
            keys = [
                key for key, good in zip(inputs["key"], finite.tolist(), strict=True) if not good
            ]
            raise UserError(
                f"The logits of {len(keys)} images are not finite; the first image is {keys[0]}. "
                "Either training diverged, or the model was built with different options than in "
                "training."
            )
        self.loss += F.cross_entropy(logits.double(), labels, reduction="sum")
        best = logits.topk(min(TOP, self.num_classes)).indices
        found = torch.zeros(len(labels), TOP, dtype=torch.int64)
        found[:, : best.shape[1]] = best == labels[:, None]
        self.hits += found.sum(0)
        pairs = labels * self.num_classes + best[:, 0]
        self.confusion += torch.bincount(pairs, minlength=self.num_classes**2).view_as(
            self.confusion
        )
        if self.keep_predictions:
            self._remember(inputs, labels, best, logits)

    def _remember(
        self, inputs: dict[str, Any], labels: Tensor, best: Tensor, logits: Tensor
    ) -> None:
        probabilities = logits.softmax(1).amax(1).tolist()
        for row, key in enumerate(inputs["key"]):
            entry = {"key": key, "index": inputs["index"][row], "label": int(labels[row])}
            entry["path"] = inputs["path"][row] if "path" in inputs else key
            entry |= {"top": best[row].tolist(), "probability": probabilities[row]}
            if self.keep_logits:
                entry["logits"] = logits[row].tolist()
            self.predictions.append(entry)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Sum the counts over all processes.

        Returns:
            On the main process, ``{"classification": {"top1_error", "top5_error", "images"}}`` with
            errors in percent and, if the loss is computed, ``{"validation": {"total_loss"}}``. On
            other processes, None.

        Raises:
            UserError: If the number of evaluated images differs from the size of the dataset.
        """
        parts = comm.gather((self.hits, self.confusion, self.predictions, self.loss))
        if not comm.is_main_process():
            return None
        self.hits = sum(part[0] for part in parts)
        self.confusion = sum(part[1] for part in parts)
        entries = [entry for part in parts for entry in part[2]]
        self.predictions = sorted(entries, key=lambda entry: entry["index"])
        images = int(self.confusion.sum())
        if images != self.expected:
            raise UserError(
                f"{images} images were evaluated; expected {self.expected}. Either the data "
                "changed during the evaluation, or several processes evaluated the same images."
            )
        if self.output_dir:
            self._write()
        top1, top5 = int(self.hits[0]), int(self.hits.sum())
        results: dict[str, dict[str, float]] = {
            "classification": {
                "top1_error": 100 * (images - top1) / images,
                "top5_error": 100 * (images - top5) / images,
                "images": images,
            }
        }
        if self.with_loss:
            results["validation"] = {"total_loss": float(sum(part[3] for part in parts)) / images}
        return results

    def _write(self) -> None:
        columns = {
            name: [entry[name] for entry in self.predictions] for name in ("index", "label", "top")
        }
        columns["probability"] = [round(entry["probability"], 5) for entry in self.predictions]
        path = os.path.join(self.output_dir, "predictions.json")
        try:
            os.makedirs(self.output_dir, exist_ok=True)
            with atomic_file(Path(path)) as file:
                file.write(json.dumps(columns, separators=(",", ":")).encode())
        except OSError as error:
            raise UserError(
                f"Cannot write predictions to {path}: {error}. Free up space or choose another "
                "folder."
            ) from error
