"""Results of commands: JSON files, and the summary printed at the end of a run."""

import json
import math
import re
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from senet_transfer.errors import UserError
from senet_transfer.evaluation.coco import DIAGNOSTICS
from senet_transfer.utils.atomic_io import write_json
from senet_transfer.utils.text import folder_name


def write_results(path: str | Path, results: Any, *, indent: int | None = 2) -> None:
    """Write results as JSON with :func:`~senet_transfer.utils.atomic_io.write_json`.

    The write is atomic because the existence of the file marks a run as finished.

    Raises:
        UserError: If the file can't be written.
    """
    try:
        write_json(path, results, indent=indent)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Choose a different path.") from error


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """Return a flat dict of the metrics in a run's results.

    The keys are names such as ``classification/top1_error``. With several evaluation datasets, each
    name starts with the dataset name, as in ``coco_2017_val/bbox/AP``. Diagnostics are excluded.
    """
    found: dict[str, float] = {}
    for name, value in results.items():
        if name == "diagnostics":
            continue
        if isinstance(value, dict):
            found.update({f"{name}/{key}": number for key, number in metrics(value).items()})
        elif isinstance(value, int | float):
            found[name] = float(value)
    return found


def with_diagnostics(cfg: CfgNode, results: dict[str, Any]) -> dict[str, Any]:
    """Add the last evaluation's diagnostics, such as counts of error types, to its results.

    Args:
        cfg: The run's config.
        results: The results of the evaluation, as returned by ``Trainer.evaluate``.

    Returns:
        The results, with the diagnostics of each task under the additional key ``diagnostics``. If
        there are several test sets, each set's results contain this key.
    """
    several = len(cfg.DATASETS.TEST) > 1
    found = dict(results)
    for folder, suffix in (("inference", ""), ("inference_TTA", "_TTA")):
        for name in cfg.DATASETS.TEST:
            path = Path(cfg.OUTPUT_DIR, folder, folder_name(name), DIAGNOSTICS)
            if not path.is_file() or (suffix and not cfg.TEST.AUG.ENABLED):
                continue
            content = json.loads(path.read_text())
            if several:
                found[name + suffix] = {**found.get(name + suffix, {}), "diagnostics": content}
            else:
                named = {task + suffix: values for task, values in content.items()}
                found["diagnostics"] = {**found.get("diagnostics", {}), **named}
    return found


# Metrics that a summary's sentence can contain, with their formats.
_HEADLINES = {
    "bbox/AP": "box AP {:.1f}",
    "segm/AP": "mask AP {:.1f}",
    "keypoints/AP": "keypoint AP {:.1f}",
    "box_proposals/AR@1000": "box AR@1000 {:.1f}",
    "sem_seg/mIoU": "mIoU {:.1f}",
    "panoptic_seg/PQ": "PQ {:.1f}",
    "classification/top1_error": "top-1 error {:.1f}%",
    "classification/top5_error": "top-5 error {:.1f}%",
}
_FILES = {
    "model": "model_final.pth",
    "best model": "model_best.pth",
    "averaged model": "model_ema.pth",
    "log": "log.txt",
    "metrics": "metrics.json",
    "results": "results.json",
}
_NAME_WIDTH = 16
# Matches the names of per-class metrics.
_OF_ONE_CLASS = re.compile(r"/(AP|IoU|BoundaryIoU|min\(IoU, B-Iou\)|ACC)-")


def metric_texts(results: dict[str, Any]) -> dict[str, str]:
    """Return a run's metrics as strings keyed by metric name, without per-class metrics."""
    return {
        name: "-" if math.isnan(value) else f"{value:{'.4f' if 'loss' in name else '.1f'}}"
        for name, value in metrics(results).items()
        if not _OF_ONE_CLASS.search(name)
    }


def summary(done: str, results: dict[str, Any], datasets: list[str], output_dir: str | Path) -> str:
    """Return a summary of a run: a sentence, and a table of the metrics and output files.

    Args:
        done: The start of the sentence, such as "Trained se_resnet18 for 700 steps".
        results: The results of the evaluation, as returned by ``Trainer.evaluate``.
        datasets: The names of the evaluated datasets.
        output_dir: The output folder of the run, whose files are listed.
    """
    by_dataset = {datasets[0]: results} if len(datasets) == 1 else results
    rows = metric_texts(results)
    evaluated = []
    for dataset in datasets:
        found = metrics(by_dataset.get(dataset, {}))
        texts = [text.format(found[name]) for name, text in _HEADLINES.items() if name in found]
        if texts:
            evaluated.append(f"{', '.join(texts)} on {dataset}")
    for name, file in _FILES.items():
        if (path := Path(output_dir, file)).is_file():
            rows[name] = str(path)
    width = max(map(len, ["", *rows])) + 2
    lines = [f"{name:<{max(width, _NAME_WIDTH)}}{value}" for name, value in rows.items()]
    return "\n".join([f"{'; '.join([done, *evaluated])}.", "", *lines])


def duration(seconds: float) -> str:
    """Format a duration, such as "2 min 31 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes)
    return " ".join([*parts, *([f"{rest} s"] if not hours else [])])
