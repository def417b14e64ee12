"""Confused classes, per-class errors and calibration of a classifier, for the HTML report."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from senet_transfer.analysis.report.pictures import data_uri
from senet_transfer.analysis.report.run_folder import Run, data_label
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import inference_dir, open_test_dataset
from senet_transfer.data.images.channels import decode_shown
from senet_transfer.data.images.decode import BrokenImageError
from senet_transfer.data.reading import reading_of
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress

BINS = 15
SIDE = 128
PAIRS = 20
EXAMPLES = 6


@dataclass
class Predictions:
    """A classifier's predictions on a dataset.

    Attributes:
        index: Image indices in the dataset, ``(N,)``.
        labels: Ground-truth labels, ``(N,)``.
        best: Predicted classes, ``(N,)``.
        probability: Probabilities of the predicted classes in [0, 1], ``(N,)``.
    """

    index: np.ndarray
    labels: np.ndarray
    best: np.ndarray
    probability: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        """Boolean mask of the correct predictions, ``(N,)``."""
        return self.best == self.labels

    def class_errors(self, classes: int) -> np.ndarray:
        """Return the top-1 error per class in percent, ``(C,)``; NaN for classes without images."""
        total = np.bincount(self.labels, minlength=classes)
        wrong = np.bincount(self.labels[~self.hit], minlength=classes)
        with np.errstate(invalid="ignore"):
            return 100 * wrong / total

    def calibration(self) -> tuple[list[list[float]], float]:
        """Compute the reliability diagram and the expected calibration error (ECE).

        Returns:
            A list with one entry per non-empty bin (mean probability and accuracy, both in [0, 1],
            and number of images), and the ECE in percent. The ECE is the mean over bins of the
            absolute difference between probability and accuracy, weighted by the number of images
            (Guo et al. 2017, equation 3).
        """
        bins = np.minimum((self.probability * BINS).astype(int), BINS - 1)
        points, error = [], 0.0
        for number in range(BINS):
            inside = bins == number
            if count := int(inside.sum()):
                mean, hits = float(self.probability[inside].mean()), float(self.hit[inside].mean())
                points.append([round(mean, 4), round(hits, 4), count])
                error += 100 * abs(mean - hits) * count / len(bins)
        return points, error

    def confused(self) -> list[tuple[int, int, np.ndarray]]:
        """Return the confused pairs of classes, most frequent first.

        Returns:
            A list of (label, predicted class, rows). The rows are indices into this object's
            arrays, sorted by decreasing probability.
        """
        wrong = np.flatnonzero(~self.hit)
        wrong = wrong[np.argsort(-self.probability[wrong], kind="stable")]
        pairs: dict[tuple[int, int], list[int]] = {}
        for row in wrong.tolist():
            pairs.setdefault((int(self.labels[row]), int(self.best[row])), []).append(row)
        order = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))
        return [(label, taken, np.array(rows)) for (label, taken), rows in order]


def read_predictions(run: Run, name: str) -> Predictions | None:
    """Read a run's predictions on a dataset in ``DATASETS.TEST``.

    Returns:
        The predictions, or None if no predictions were saved.

    Raises:
        UserError: If the file is corrupted.
    """
    path = run.folder / inference_dir(run.cfg, name) / "predictions.json"
    if not path.is_file():
        return None
    try:
        columns = json.loads(path.read_text())
        best = [top[0] for top in columns["top"]]
        return Predictions(
            index=np.array(columns["index"], np.int64),
            labels=np.array(columns["label"], np.int64),
            best=np.array(best, np.int64),
            probability=np.array(columns["probability"], np.float64),
        )
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} can't be read: {error!r}. Repeat the evaluation.") from error


def confusion_galleries(
    runs: list[Run], budget: int, say: Callable[[str], None], *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Collect confused classes, example images, per-class errors and calibration by dataset.

    Args:
        runs: The runs to report on.
        budget: The maximum total number of images in all galleries.
        say: A function that is called with a message if an image can't be shown.
        quiet: If True, show no progress bar.

    Returns:
        One dict per dataset with ``data`` (its name), ``classes``, ``runs`` (indices), ``errors``
        (in percent, by run and class), ``calibration`` and ``ece`` (by run), ``images`` (data URIs,
        by index) and ``pairs``. Each pair is a dict with ``run``, ``label``, ``taken`` (the
        predicted class), ``count``, ``of`` (the number of images with this label) and
        ``examples``, a list of image indices and probabilities in percent.
    """
    groups: dict[tuple[str, tuple[str, ...]], dict[int, Predictions]] = {}
    for position, run in enumerate(runs):
        for name in run.cfg.DATASETS.TEST:
            try:
                predictions = read_predictions(run, name)
            except UserError as error:
                say(f"{run.name}: {error}")
                continue
            if predictions is not None:
                group = groups.setdefault((name, tuple(run.cfg.DATASETS.CLASSES)), {})
                group[position] = predictions
    galleries = []
    for (name, classes), found in groups.items():
        gallery = _gallery(name, list(classes), found, budget // len(groups))
        wanted = {index for pair in gallery["pairs"] for index, _ in pair["examples"]}
        cfg = runs[min(found)].cfg
        gallery["images"] = pictures(cfg, name, sorted(wanted), say, quiet)
        galleries.append(gallery)
    return galleries


def _gallery(
    name: str, classes: list[str], found: dict[int, Predictions], budget: int
) -> dict[str, Any]:
    examples = min(EXAMPLES, max(budget // (PAIRS * len(found)), 1))
    pairs = []
    for position, predictions in found.items():
        of = np.bincount(predictions.labels, minlength=len(classes))
        for label, taken, rows in predictions.confused()[:PAIRS]:
            shown = [
                [int(predictions.index[row]), round(100 * predictions.probability[row])]
                for row in rows[:examples]
            ]
            pairs.append({
                "run": position, "label": label, "taken": taken, "count": len(rows),
                "of": int(of[label]), "examples": shown,
            })  # fmt: skip
    calibration = {position: predictions.calibration() for position, predictions in found.items()}
    return {
        "data": data_label(name),
        "classes": classes,
        "runs": list(found),
        "errors": {k: v.class_errors(len(classes)).tolist() for k, v in found.items()},
        "calibration": {position: points for position, (points, _) in calibration.items()},
        "ece": {position: error for position, (_, error) in calibration.items()},
        "pairs": pairs,
    }


def pictures(
    cfg: CfgNode, name: str, indices: list[int], say: Callable[[str], None], quiet: bool
) -> dict[int, str]:
    """Encode images of a test set as data URIs.

    Args:
        cfg: The run's config.
        name: The dataset's name in ``DATASETS.TEST``.
        indices: Indices of the images in the dataset.
        say: A function that is called with a message if an image can't be shown.
        quiet: If True, show no progress bar.

    Returns:
        A dict from image index to data URI, without images that can't be shown.
    """
    found: dict[int, str] = {}
    reading = reading_of(cfg)
    try:
        dataset = open_test_dataset(cfg, name)
        for index in progress(
            indices, desc=f"pictures of {data_label(name)}", unit="image", quiet=quiet
        ):
            if isinstance(dataset, ClassificationDataset):
                pixels = decode_shown(dataset.read_sample(index).data, reading, SIDE)
            else:
                pixels = dataset.images[index].permute(1, 2, 0).numpy()
            found[index] = data_uri(pixels, SIDE)[0]
    except (UserError, BrokenImageError, OSError, LookupError) as error:
        say(f"Some images of {name} can't be shown: {error}")
    return found
