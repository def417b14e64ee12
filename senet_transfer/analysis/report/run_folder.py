"""Reader for the files that training and evaluation write to a run's folder."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from senet_transfer.config import config_items
from senet_transfer.errors import UserError

# Names of evaluation results in Detectron2's format: [dataset/]task/metric.
_METRIC = re.compile(r"^(?:(.+)/)?((?:bbox|segm|keypoints|classification)(?:_TTA)?)/([^/].*)$")

Series = list[tuple[int, float]]


@dataclass
class Run:
    """Contents of a run's folder.

    Attributes:
        folder: Path of the run's folder.
        name: Short, unique name for the run.
        cfg: Complete config.
        curves: Pairs of iteration and value for each metric, including evaluation metrics.
        results: Results of the last evaluation by dataset ("" if there is only one), task and
            metric.
        seconds: Total training time in seconds, including the time before the run was resumed.
            None if unknown.
        memory_mb: Peak memory in MB. None if unknown.
        eta_seconds: Estimated remaining training time in seconds at the last logged iteration.
            None if unknown.
        command: Command line that started the run.
        environment: Description of the package versions and the machine.
    """

    folder: Path
    name: str
    cfg: CfgNode
    curves: dict[str, Series] = field(default_factory=dict)
    results: dict[tuple[str, str, str], float] = field(default_factory=dict)
    seconds: float | None = None
    memory_mb: float | None = None
    eta_seconds: float | None = None
    command: str = ""
    environment: str = ""

    @property
    def iterations(self) -> int:
        """Number of training iterations completed at the last log entry."""
        # Use only the training loss, because evaluation results are logged at the next iteration.
        points = self.curves.get("total_loss")
        return points[-1][0] + 1 if points else 0

    @property
    def is_finished(self) -> bool:
        """True if training is finished."""
        if self.eta_seconds is not None:
            return self.eta_seconds == 0
        return (self.folder / "model_final.pth").is_file()

    def value(self, data: str, task: str, metric: str) -> float | None:
        """Return a metric of the last evaluation on a dataset in ``DATASETS.TEST``.

        Return None if the results don't contain the metric.
        """
        for name in (data, ""):
            if (name, task, metric) in self.results:
                return self.results[name, task, metric]
        return None


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Find the folders of training runs.

    Args:
        folders: The folders of single runs, or folders that contain runs.

    Raises:
        UserError: If a folder is neither the output folder of a run nor contains such a folder.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if (folder / "config.yaml").is_file():
            below = [folder]
        else:
            below = sorted(path.parent for path in folder.glob("*/config.yaml"))
        if not below:
            what = (
                "contains no config.yaml, and neither do its subfolders"
                if folder.is_dir()
                else "is not a folder"
            )
            raise UserError(
                f"{folder} {what}. Expected the output folder of `senet train`, or a folder "
                "that contains such folders."
            )
        found |= dict.fromkeys(below)
    return list(found)


def load_run(folder: Path, name: str = "") -> Run:
    """Load a finished or unfinished run.

    Args:
        folder: The run's folder.
        name: The run's name. If empty, the folder name is used.

    Raises:
        UserError: If the config can't be read.
    """
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} can't be read: {error}.") from error
    if not isinstance(content, dict) or not {"MODEL", "DATASETS"} <= content.keys():
        raise UserError(
            f"{folder / 'config.yaml'} isn't a run's config: it must contain the sections MODEL "
            "and DATASETS. Expected the config.yaml written by training."
        )
    run = Run(folder, name or folder.resolve().name, CfgNode(content))
    _read_metrics(run)
    _read_results(run)
    _read_environment(run)
    return run


def load_runs(folders: list[Path]) -> list[Run]:
    """Load runs, and name each run after the shortest unique suffix of its path."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    names = ["/".join(path[-depth:]) for path in parts]
    return [load_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the parsed lines of a metrics.json file, skipping incomplete lines."""
    if not path.is_file():
        return
    with open(path, errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                yield row


def _read_metrics(run: Run) -> None:
    values: dict[str, dict[int, float]] = {}
    for row in _rows(run.folder / "metrics.json"):
        iteration = row.pop("iteration")
        for name, value in row.items():
            if isinstance(value, int | float):
                # A resumed run repeats some iterations. Keep the later value and its position.
                values.setdefault(name, {}).pop(iteration, None)
                values[name][iteration] = float(value)
    step = values.get("time", {})
    elapsed = values.pop("elapsed_seconds", {})
    run.curves = {name: sorted(points.items()) for name, points in values.items()}
    if memory := run.curves.pop("peak_memory_mb", None):
        run.memory_mb = max(value for _, value in memory)
    if elapsed:
        run.seconds = _total_seconds(run.folder / "metrics.json")
    elif step:
        run.seconds = sum(step.values()) / len(step) * run.iterations
    if eta := run.curves.pop("eta_seconds", None):
        run.eta_seconds = eta[-1][1]
    for name, points in run.curves.items():
        if found := parse_metric(name):
            run.results[found] = points[-1][1]


def _total_seconds(path: Path) -> float:
    """Return the total training time of a run in seconds, including the time before each resume.

    The logged metric ``elapsed_seconds`` restarts at 0 whenever the run is resumed.
    """
    before, elapsed = 0.0, 0.0
    for row in _rows(path):
        now = row.get("elapsed_seconds")
        if isinstance(now, int | float):
            if now < elapsed:
                before += elapsed
            elapsed = now
    return before + elapsed


def _read_results(run: Run) -> None:
    """Add the results in ``results.json`` to a run, unless its ``metrics.json`` is newer."""
    path, metrics = run.folder / "results.json", run.folder / "metrics.json"
    if not path.is_file():
        return
    if metrics.is_file() and os.path.getmtime(metrics) > os.path.getmtime(path):
        return
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}. Repeat the evaluation.") from error
    training = content.get("training") if isinstance(content, dict) else None
    if isinstance(training, dict) and training.get("iterations") == run.iterations:
        run.eta_seconds = 0.0  # also if training has ended before the last planned iteration
    for name, value in _flat(content):
        if isinstance(value, int | float) and (found := parse_metric(name)):
            run.results[found] = float(value)


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict):
        yield prefix, content
        return
    for key, value in content.items():
        if key == "diagnostics":
            continue
        yield from _flat(value, f"{prefix}/{key}" if prefix else str(key))


def parse_metric(name: str) -> tuple[str, str, str] | None:
    """Split a metric's name into dataset, task and metric.

    Return None if the metric is not an evaluation metric.
    """
    match = _METRIC.match(name)
    return (match[1] or "", match[2], match[3]) if match else None


def _read_environment(run: Run) -> None:
    path = run.folder / "environment.txt"
    if path.is_file():
        run.command, _, run.environment = path.read_text(errors="replace").partition("\n")
        run.environment = run.environment.strip()


def config_texts(cfg: CfgNode) -> dict[str, str]:
    """Return a dict with the value of each config key, formatted as a string."""
    return {key: _text(value) for key, value in config_items(cfg)}


def data_label(name: str) -> str:
    """Return a short label for a dataset: its name, or the last two parts of its path."""
    end = "/".join(Path(name).parts[-2:]) if name.startswith("/") or "://" in name else name
    return end.removesuffix(".safetensors")


def _text(value: Any) -> str:
    # Tuples are saved as lists in YAML, so both must give the same text.
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)
