"""Evaluation of logits that were saved by earlier evaluations of classifiers."""

import csv
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification import Evaluation
from senet_transfer.evaluation.classification_evaluator import ClassificationEvaluator
from senet_transfer.models.averaged import average_logits


@dataclass(frozen=True)
class SavedLogits:
    """Contents of a CSV file written by ``senet eval --predictions FILE --logits``.

    Attributes:
        file: Path of the file.
        rows: Dictionary from image key to the zero-based index of its row.
        labels: Label and class name of each image.
        paths: Path of each image.
        logits: Logits of each image, float32 ``(N, C)``.
    """

    file: str
    rows: dict[str, int]
    labels: list[tuple[int, str]]
    paths: list[str]
    logits: np.ndarray

    @classmethod
    def read(cls, file: str) -> "SavedLogits":
        """Read a CSV file with logits.

        Raises:
            UserError: If the file can't be read or contains no logits.
        """
        rows: dict[str, int] = {}
        labels, paths, logits = [], [], []
        try:
            for index, (key, label, name, path, values) in enumerate(_lines(file)):
                if rows.setdefault(key, index) != index:
                    raise UserError(
                        f"{file} contains two rows with the key {key}; expected one row per image."
                    )
                labels.append((int(label), name))
                paths.append(path)
                logits.append(np.array(values, dtype=np.float32))
            found = np.stack(logits)
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(
                f"The logits in {file} can't be read: {error}. Expected a CSV file written by "
                "senet eval with --predictions and --logits."
            ) from error
        return cls(file, rows, labels, paths, found)


def _lines(file: str) -> Iterator[tuple[str, str, str, str, list[str]]]:
    """Yield the key, label, class name, path and logits of each image."""
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
        reader = csv.reader(opened)
        header = next(reader, [])
        key, label, name, path = map(header.index, ("key", "label", "class", "path"))
        first = header.index("logit0")
        end = first + sum(re.fullmatch(r"logit\d+", word) is not None for word in header)
        for row in reader:
            if len(row) < len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} columns; expected {len(header)}"
                )
            yield row[key], row[label], row[name], row[path], row[first:end]


def evaluate_saved_logits(
    files: Sequence[str], *, keep_predictions: bool = False, keep_logits: bool = False
) -> Evaluation:
    """Evaluate the mean class probabilities computed from the logits in several files.

    Args:
        files: CSV files for the same images, written by ``senet eval --predictions FILE --logits``.
        keep_predictions: If True, return the top classes of each image.
        keep_logits: If True, return the logarithm of the mean probabilities of each image.

    Raises:
        UserError: If a file can't be read, or if the files differ in their images or classes.
    """
    start = time.perf_counter()
    read = [SavedLogits.read(file) for file in files]
    first = read[0]
    count = first.logits.shape[1]
    for other in read[1:]:
        _check_same(first, other)
    ordered = [
        torch.from_numpy(found.logits[[found.rows[key] for key in first.rows]]) for found in read
    ]
    labels = [label for label, _ in first.labels]
    evaluator = ClassificationEvaluator(
        count, len(labels), keep_predictions=keep_predictions, keep_logits=keep_logits
    )
    inputs = {
        "label": torch.tensor(labels),
        "key": list(first.rows),
        "index": list(range(len(labels))),
        "path": first.paths,
    }
    evaluator.process(inputs, average_logits(ordered))
    results: dict[str, Any] = evaluator.evaluate() or {}
    # The files name only the classes that have images.
    names = dict(first.labels)
    return Evaluation(
        **results["classification"],
        seconds=time.perf_counter() - start,
        waited=0.0,
        classes=[names.get(label, f"class {label}") for label in range(count)],
        confusion=evaluator.confusion,
        predictions=evaluator.predictions,
    )


def _check_same(first: SavedLogits, other: SavedLogits) -> None:
    """Raise a UserError if two files differ in their images or classes."""
    files = f"{first.file} and {other.file}"
    counts = first.logits.shape[1], other.logits.shape[1]
    if counts[0] != counts[1]:
        raise UserError(
            f"{files} contain logits for {counts[0]} and {counts[1]} classes; expected the same "
            "number of classes. Evaluate both models on the same data."
        )
    if differing := first.rows.keys() ^ other.rows.keys():
        raise UserError(
            f"{files} contain different images: {len(differing)} images are in only one file, "
            f"such as {min(differing)}. Evaluate both models on the same data."
        )
    for key, row in first.rows.items():
        labels = first.labels[row], other.labels[other.rows[key]]
        if labels[0] != labels[1]:
            raise UserError(
                f"{files} have different classes: the label of {key} is {labels[0][0]} "
                f"({labels[0][1]}) in the first file and {labels[1][0]} ({labels[1][1]}) in the "
                "second. Combine only files with the same classes in the same order."
            )
