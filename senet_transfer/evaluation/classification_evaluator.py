"""Detectron2 evaluator of top-1 and top-5 error."""

import json
import os
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from senet_transfer.errors import UserError

TOP = 5


class ClassificationEvaluator(DatasetEvaluator):
    """Evaluator that counts correct predictions over all processes.

    Attributes:
        confusion: Confusion matrix: the number of images by label and prediction, int64
            ``(C, C)``. It covers all processes after :meth:`evaluate`, on the main process.
        predictions: With ``keep_logits`` or ``keep_predictions``, one row per image in the order of
            the data.
    """

    def __init__(
        self,
        num_classes: int,
        expected: int,
        *,
        keep_predictions: bool = False,
        keep_logits: bool = False,
        output_dir: str = "",
    ):
        """
        Args:
            num_classes: The number of classes of the model and the data.
            expected: The number of images in the data set, to check that each one was evaluated.
            keep_predictions: Keep the key, label and top classes of each image.
            keep_logits: Keep the logits of each image in addition.
            output_dir: The folder for ``predictions.json``, which contains one list per column:
                ``index`` (in the data set), ``label``, ``top`` (the top classes) and
                ``probability`` (of the best class, in [0, 1]). If empty, the file isn't written.
        """
        self.num_classes = num_classes
        self.expected = expected
        self.output_dir = output_dir
        self.keep_predictions = keep_predictions or keep_logits or bool(output_dir)
        self.keep_logits = keep_logits
        self.reset()

    def reset(self) -> None:
        """Reset all counts."""
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        self.hits = torch.zeros(TOP, dtype=torch.int64)
        self.predictions: list[dict[str, Any]] = []

    def process(self, inputs: dict[str, Any], outputs: Tensor) -> None:
        """Add a batch of the evaluation loader and its logits ``(N, C)``."""
        logits, labels = outputs.float().cpu(), inputs["label"].cpu()
        if logits.shape[1] != self.num_classes:
            raise UserError(
                f"The model has {logits.shape[1]} classes, but the data has {self.num_classes}. "
                "Evaluate the model on data with the classes that it was trained on."
            )
        finite = logits.isfinite().all(1)
        if not finite.all():
            keys = [
                key for key, good in zip(inputs["key"], finite.tolist(), strict=True) if not good
            ]
            raise UserError(
                f"The logits of {len(keys)} images are not finite, the first of {keys[0]}. "
                "Training diverged, or the model was not loaded with the options that it was "
                "trained with."
            )
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
            entry |= {"top": best[row].tolist(), "probability": probabilities[row]}
            if self.keep_logits:
                entry["logits"] = logits[row].tolist()
            self.predictions.append(entry)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Combine the counts of all processes.

        Returns:
            ``{"classification": {"top1_error", "top5_error", "images"}}`` with errors in percent on
            the main process, None on the others.

        Raises:
            UserError: If the number of evaluated images isn't the size of the data set.
        """
        parts = comm.gather((self.hits, self.confusion, self.predictions))
        if not comm.is_main_process():
            return None
        self.hits = sum(part[0] for part in parts)
        self.confusion = sum(part[1] for part in parts)
        entries = [entry for part in parts for entry in part[2]]
        self.predictions = sorted(entries, key=lambda entry: entry["index"])
        images = int(self.confusion.sum())
        if images != self.expected:
            raise UserError(
                f"Evaluation saw {images} images, expected {self.expected}. The data changed "
                "during evaluation, or several processes evaluated the same images."
            )
        if self.output_dir:
            self._write()
        top1, top5 = int(self.hits[0]), int(self.hits.sum())
        return {
            "classification": {
                "top1_error": 100 * (images - top1) / images,
                "top5_error": 100 * (images - top5) / images,
                "images": images,
            }
        }

    def _write(self) -> None:
        columns = {
            name: [entry[name] for entry in self.predictions] for name in ("index", "label", "top")
        }
        columns["probability"] = [round(entry["probability"], 5) for entry in self.predictions]
        path = os.path.join(self.output_dir, "predictions.json")
        try:
            os.makedirs(self.output_dir, exist_ok=True)
            with open(path, "w") as file:
                json.dump(columns, file, separators=(",", ":"))
        except OSError as error:
            raise UserError(f"The predictions {path} can't be written: {error}.") from error
