"""Runs that are made once: what is finished is kept, what broke off is taken up.

A run is a config, options over it, and a folder of its own. Its folder has the config it was begun
with in ``run.json`` and, once it is through, what came of it in ``results.json``.
"""

import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from senet_transfer.config import config_items, is_classification
from senet_transfer.config.load import load_config
from senet_transfer.engine.checkpoints.checkpoint_history import checkpoints
from senet_transfer.engine.results import metrics
from senet_transfer.engine.train import RESULTS
from senet_transfer.errors import UserError
from senet_transfer.evaluation.paper_results import published_on_cifar
from senet_transfer.models.build import backbone_name
from senet_transfer.utils.atomic_io import write_json
from senet_transfer.utils.text import first_of

_RECORD = "run.json"

logger = logging.getLogger(__name__)


def run_once(
    config_file: str,
    options: Sequence[str],
    output_dir: str | Path,
    *,
    flags: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains as ``tools/train_net.py`` does, unless that has been done.

    Args:
        config_file: as of ``--config-file``.
        options: alternating keys and values over it.
        output_dir: of this run alone; takes the place of ``OUTPUT_DIR``.
        flags: other words of the command line, such as ``("--num-gpus", "8")``. They don't belong
            to what the run is: a run that broke off may be taken up with others.
        quiet: whether to leave the log to ``log.txt``.

    Returns:
        What ``results.json`` holds: metrics by task, such as ``{"classification": {"top1_error":
        6.4, ...}}``, and ``{"training": {"iterations", "seconds_per_iteration"}}``, the seconds
        without those of evaluation and saving, and since a resumption where there was one.

    Raises:
        UserError: the config is wrong, the folder holds another run, or the run failed.
    """
    output_dir = Path(output_dir)
    options = [*options, "OUTPUT_DIR", str(output_dir)]
    config = {key: repr(value) for key, value in config_items(load_config(config_file, options))}
    _check_same(output_dir, config)
    found = finished(output_dir)
    if found is not None:
        logger.info("%s is finished already.", output_dir)
        return found
    resume = ["--resume"] if checkpoints(output_dir) else []
    command = [sys.executable, "-m", "senet_transfer.cli.train", "--config-file", config_file]
    # A process of its own: Detectron2's loggers and registries are the process's.
    status = subprocess.run(
        [*command, *flags, *resume, *options], stdout=subprocess.DEVNULL if quiet else None
    ).returncode
    found = finished(output_dir)
    if status or found is None:
        raise UserError(
            f"The run in {output_dir} ended with status {status} before it was through; its log is "
            f"{output_dir / 'log.txt'}. The same command goes on where it was."
        )
    return found


def finished(output_dir: str | Path) -> dict[str, Any] | None:
    """The results of a training run that is through; None where there is none."""
    path = Path(output_dir) / RESULTS
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    # An evaluation writes a file of this name, too.
    return found if "training" in found else None


def _check_same(output_dir: Path, config: dict[str, str]) -> None:
    """Writes down what a new run is; refuses a folder that holds another one."""
    record = output_dir / _RECORD
    if record.is_file():
        begun = json.loads(record.read_text())
        other = [key for key in begun.keys() | config.keys() if begun.get(key) != config.get(key)]
        if other:
            first = sorted(other)[0]
            raise UserError(
                f"{output_dir} holds a run that differs in {first_of(sorted(other), 5)}: "
                f"{first} was {begun.get(first)} and is {config.get(first)}. Take another output "
                "folder, or delete this one."
            )
        return
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"{output_dir} holds files, and no {_RECORD} that says of which run. Take another "
            "output folder, or empty this one."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(record, config)


def run_seeds(
    config_file: str,
    seeds: Iterable[int],
    options: Sequence[str],
    output_dir: str | Path,
    **arguments: Any,
) -> dict[int, dict[str, Any]]:
    """Runs a config with each of several seeds, one after the other, in ``output_dir/seed<N>``.

    Args:
        config_file: as for :func:`run_once`, as all else.
        seeds: values of ``SEED``.
        options: likewise.
        output_dir: of all runs.
        arguments: likewise.

    Returns:
        The results by seed.
    """
    results = {}
    for seed in seeds:
        folder = Path(output_dir) / f"seed{seed}"
        results[seed] = run_once(config_file, [*options, "SEED", str(seed)], folder, **arguments)
    return results


def mean_and_deviation(results: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the metrics that all of some runs have.

    The deviation is that of a sample (over n - 1); of a single run it is nan.
    """
    rows = [metrics(result) for result in results]
    summary = {}
    for name in rows[0]:
        if all(name in row for row in rows):
            values = [row[name] for row in rows]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            summary[name] = (statistics.fmean(values), deviation)
    return summary


def seeds_report(
    config_file: str, options: Sequence[str], results: dict[int, dict[str, Any]]
) -> str:
    """A table of what :func:`run_seeds` returned, a row a metric, and the paper's figure below."""
    cfg = load_config(config_file, list(options))
    rows = {seed: metrics(result) for seed, result in results.items()}
    table = [
        [name, *(f"{row[name]:.3f}" for row in rows.values()), f"{mean:.3f}", f"{deviation:.3f}"]
        for name, (mean, deviation) in mean_and_deviation(list(results.values())).items()
    ]
    header = ["", *(f"seed {seed}" for seed in results), "mean", "std"]
    lines = [tabulate(table, header, tablefmt="pipe", disable_numparse=True, stralign="right")]
    published = None
    if is_classification(cfg) and cfg.DATASETS.TEST:
        model = backbone_name(cfg)
        published = published_on_cifar(cfg.DATASETS.TEST[0], model)
    if published:
        lines.append(f"{published.name}: {published.top1_error:.2f} ({published.source})")
    return "\n".join(lines)
