"""Reader for the diagnostics files that are written when a detector is evaluated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from senet_transfer.analysis.report.run_folder import Run, data_label
from senet_transfer.errors import UserError
from senet_transfer.evaluation.coco import DIAGNOSTICS
from senet_transfer.evaluation.error_types import ERROR_TYPES
from senet_transfer.utils.text import folder_name

# Maximum size of a complete confusion matrix. For larger ones, only the most confused classes are
# shown.
MOST_CLASSES = 24

_TASKS = {"bbox": "boxes", "segm": "masks"}
_ERRORS = {
    "classification": "correct location, wrong class",
    "localisation": "correct class, poor localisation",
    "both": "wrong class and poor localisation",
    "duplicate": "duplicate of a better detection of the same object",
    "background": "detection of background",
    "missed": "ground-truth object without a detection",
}


def detection_diagnostics(runs: list[Run], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Read the detector diagnostics of all runs.

    Args:
        runs: The runs to report on.
        say: A function that is called with a message if a file can't be read.

    Returns:
        One dict per dataset and IoU type. ``data`` is the label of the dataset, ``task`` the
        label of the IoU type, and ``errors`` describes the types of errors. ``runs`` maps run
        indices to the results of :func:`~senet_transfer.evaluation.diagnostics.diagnose`, with the
        confusion matrix limited to :data:`MOST_CLASSES` classes.
    """
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for position, run in enumerate(runs):
        for folder, suffix in (("inference", ""), ("inference_TTA", " with augmentation")):
            for name in run.cfg.DATASETS.TEST:
                try:
                    content = _read(run.folder / folder / folder_name(name) / DIAGNOSTICS)
                except UserError as error:
                    say(f"{run.name}: {error}")
                    continue
                for task, found in content.items():
                    label = _TASKS[task] + suffix
                    groups.setdefault((data_label(name), label), {})[position] = found
    return [
        {
            "data": data,
            "task": task,
            "errors": [{"name": name, "text": _ERRORS[name]} for name in ERROR_TYPES],
            "runs": {position: _shown(one) for position, one in found.items()},
        }
        for (data, task), found in groups.items()
    ]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the diagnostics by IoU type, or an empty dict if the file doesn't exist."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if all(task in _TASKS and "confusion" in found for task, found in content.items()):
            return content
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} can't be read: {error}. Repeat the evaluation.") from error
    raise UserError(f"{path} contains no diagnostics. Repeat the evaluation.")


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    """Return the diagnostics, with the confusion matrix limited to the most confused classes."""
    matrix = found["confusion"]["matrix"]
    count = len(matrix) - 1
    labels = list(range(count))
    if count > MOST_CLASSES:

        def confused(label: int) -> int:
            row = sum(matrix[label][:count]) - matrix[label][label]
            return row + sum(line[label] for line in matrix[:count]) - matrix[label][label]

        labels = sorted(sorted(labels, key=lambda label: -confused(label))[:MOST_CLASSES])
    kept = [*labels, count]
    part = [[matrix[row][column] for column in kept] for row in kept]
    confusion = {**found["confusion"], "matrix": part, "labels": labels, "classes": count}
    return {**found, "confusion": confusion}
