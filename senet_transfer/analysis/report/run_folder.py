"""What training and evaluation leave in a run's folder, read back."""

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

# [data set/]task/metric, as Detectron2 names what an evaluation found.
_METRIC = re.compile(r"^(?:(.+)/)?((?:bbox|segm|keypoints|classification)(?:_TTA)?)/([^/].*)$")

Series = list[tuple[int, float]]


@dataclass
class Run:
    """A run's folder.

    Attributes:
        folder: where it is.
        name: short, different from those of the other runs.
        cfg: its whole config.
        curves: by metric, its values by iteration; those of evaluations among them.
        results: the last evaluation's, by data set ("" where there is but one), task and metric.
        seconds: that training took, of all its parts; None where nothing says so.
        memory_mb: the most that was in use, in MB; None likewise.
        eta_seconds: to the end of training, as of the last line of the log; None likewise.
        command: line that started it.
        environment: versions and machine, as text.
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
        """How many are done, as far as is written."""
        # Of steps alone: the line of an evaluation counts one iteration more.
        points = self.curves.get("total_loss")
        return points[-1][0] + 1 if points else 0

    @property
    def is_finished(self) -> bool:
        """Whether training has come to its end."""
        if self.eta_seconds is not None:
            return self.eta_seconds == 0
        return (self.folder / "model_final.pth").is_file()

    def value(self, data: str, task: str, metric: str) -> float | None:
        """A result of the last evaluation, on a data set of ``DATASETS.TEST``."""
        for name in (data, ""):
            if (name, task, metric) in self.results:
                return self.results[name, task, metric]
        return None


def find_runs(places: Iterable[str | Path]) -> list[Path]:
    """The runs' folders that paths name: a run's own, or one that holds runs.

    Raises:
        UserError: there is no run.
    """
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if (place / "config.yaml").is_file():
            below = [place]
        else:
            below = sorted(path.parent for path in place.glob("*/config.yaml"))
        if not below:
            what = (
                "has no config.yaml, nor has a folder in it" if place.is_dir() else "is no folder"
            )
            raise UserError(
                f"{place} {what}. Expected the OUTPUT_DIR of a run of tools/train_net.py, or a "
                "folder of such."
            )
        found |= dict.fromkeys(below)
    return list(found)


def load_run(folder: Path, name: str = "") -> Run:
    """Reads a run, finished or not.

    Args:
        folder: of the run.
        name: by default that of the folder.

    Raises:
        UserError: its config can't be read.
    """
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} can't be read: {error}.") from error
    if not isinstance(content, dict) or not {"MODEL", "DATASETS"} <= content.keys():
        raise UserError(
            f"{folder / 'config.yaml'} is not the config of a run; expected a whole one."
        )
    run = Run(folder, name or folder.resolve().name, CfgNode(content))
    _read_metrics(run)
    _read_results(run)
    _read_environment(run)
    return run


def load_runs(folders: list[Path]) -> list[Run]:
    """Reads runs and gives each the shortest end of its path that no other has."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    names = ["/".join(path[-depth:]) for path in parts]
    return [load_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.json; one that is just being written, or torn, is left out."""
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
                # A resumed run repeats some iterations: the later line counts, and comes last.
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
    """Return the sum over the parts of a run, whose clock starts anew with each resumption."""
    before, elapsed = 0.0, 0.0
    for row in _rows(path):
        now = row.get("elapsed_seconds")
        if isinstance(now, int | float):
            if now < elapsed:
                before += elapsed
            elapsed = now
    return before + elapsed


def _read_results(run: Run) -> None:
    """Takes what ``--eval-only`` found, where that is newer than training's own evaluations."""
    path, metrics = run.folder / "results.json", run.folder / "metrics.json"
    if not path.is_file():
        return
    if metrics.is_file() and os.path.getmtime(metrics) > os.path.getmtime(path):
        return
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}. Evaluate again.") from error
    for name, value in _flat(content):
        if isinstance(value, int | float) and (found := parse_metric(name)):
            run.results[found] = float(value)


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict):
        yield prefix, content
        return
    for key, value in content.items():
        yield from _flat(value, f"{prefix}/{key}" if prefix else str(key))


def parse_metric(name: str) -> tuple[str, str, str] | None:
    """Data set, task and metric of an evaluation's scalar; None for one of training."""
    match = _METRIC.match(name)
    return (match[1] or "", match[2], match[3]) if match else None


def _read_environment(run: Run) -> None:
    path = run.folder / "environment.txt"
    if path.is_file():
        run.command, _, run.environment = path.read_text(errors="replace").partition("\n")
        run.environment = run.environment.strip()


def config_texts(cfg: CfgNode) -> dict[str, str]:
    """Return the values of a config as text, by key."""
    return {key: _text(value) for key, value in config_items(cfg)}


def data_label(name: str) -> str:
    """A data set as a reader knows it: the end of its path, or its name."""
    end = "/".join(Path(name).parts[-2:]) if name.startswith("/") or "://" in name else name
    return end.removesuffix(".safetensors")


def _text(value: Any) -> str:
    # A tuple becomes a list in a file: no difference.
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)
