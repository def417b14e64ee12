"""Training runs that are skipped if finished and resumed if interrupted.

Each run has a config, options that override it, and a separate folder. The folder contains the
original config in ``run.json`` and, after training, the results in ``results.json``.
"""

import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    """Train in the same way as ``tools/train_net.py``, unless the run is already finished.

    Args:
        config_file: The config file, as for ``--config-file``.
        options: Alternating keys and values that override the config.
        output_dir: The run's folder, which must not be shared with other runs. It overrides
            ``OUTPUT_DIR``.
        flags: Other command-line arguments, such as ``("--num-gpus", "8")``. They don't identify
            the run: an interrupted run can be resumed with different flags.
        quiet: If True, write the log only to ``log.txt``.

    Returns:
        The contents of ``results.json``: metrics by task, such as ``{"classification":
        {"top1_error": 6.4, ...}}``, and ``{"training": {"iterations", "seconds_per_iteration"}}``.
        The time excludes evaluation and checkpointing, and is measured since the run was last
        resumed.

    Raises:
        UserError: If the config is invalid, if the folder contains a different run, or if training
            failed.
    """
    output_dir = Path(output_dir)
    options = [*options, "OUTPUT_DIR", str(output_dir)]
    config = {key: repr(value) for key, value in config_items(load_config(config_file, options))}
    _check_same(output_dir, config)
    found = finished(output_dir)
    if found is not None:
        logger.info("The run in %s is already finished.", output_dir)
        return found
    # A failed attempt without a checkpoint may still have left files of this run.
    resume = ["--resume"] if checkpoints(output_dir) else ["--overwrite"]
    command = [sys.executable, "-m", "senet_transfer.cli.train", "--config-file", config_file]
    # Use a separate process because Detectron2's loggers and registries are global.
    status = subprocess.run(
        [*command, *flags, *resume, *options], stdout=subprocess.DEVNULL if quiet else None
    ).returncode
    found = finished(output_dir)
    if status or found is None:
        raise UserError(
            f"The run in {output_dir} ended with exit status {status} before it finished. See the "
            f"log in {output_dir / 'log.txt'}. Repeat the command to resume the run."
        )
    return found


def finished(output_dir: str | Path) -> dict[str, Any] | None:
    """Return a training run's results, or None if the run isn't finished."""
    path = Path(output_dir) / RESULTS
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    # Evaluation without training also writes a file with this name.
    return found if "training" in found else None


def _check_same(output_dir: Path, config: dict[str, str]) -> None:
    """Record the config of a new run, or raise an error if the folder contains a different run."""
    record = output_dir / _RECORD
    if record.is_file():
        begun = json.loads(record.read_text())
        other = [key for key in begun.keys() | config.keys() if begun.get(key) != config.get(key)]
        if other:
            first = sorted(other)[0]
            raise UserError(
                f"{output_dir} contains a run with a different config. It differs in "
                f"{first_of(sorted(other), 5)}: {first} was {begun.get(first)} and is now "
                f"{config.get(first)}. Choose a different output folder, or delete this one."
            )
        return
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"{output_dir} contains files but no {_RECORD}, so its run can't be identified. Choose "
            "a different output folder, or empty this one."
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
    """Train with several seeds, one after another, in ``output_dir/seed<N>``.

    Args:
        config_file: The config file.
        seeds: The values for ``SEED``.
        options: Alternating keys and values that override the config.
        output_dir: The parent folder of all runs.
        arguments: Keyword arguments for :func:`run_once`.

    Returns:
        The results by seed.
    """
    results = {}
    for seed in seeds:
        folder = Path(output_dir) / f"seed{seed}"
        results[seed] = run_once(config_file, [*options, "SEED", str(seed)], folder, **arguments)
    return results


def run_folds(
    config_file: str,
    folds: Mapping[str, Sequence[str]],
    options: Sequence[str],
    output_dir: str | Path,
    **arguments: Any,
) -> dict[str, dict[str, Any]]:
    """Train on each fold, one after another, in ``output_dir/fold<N>``.

    Args:
        config_file: The config file.
        folds: The config options of each fold, returned by :func:`fold_options`.
        options: Alternating keys and values that override the config.
        output_dir: The parent folder of all runs.
        arguments: Keyword arguments for :func:`run_once`.

    Returns:
        The results by name of the fold.
    """
    return {
        name: run_once(config_file, [*options, *data], Path(output_dir) / name, **arguments)
        for name, data in folds.items()
    }


def fold_options(
    config_file: str, folds: str | Path, options: Sequence[str], *, images: str | Path = ""
) -> dict[str, list[str]]:
    """Return the config options that select the data of each fold.

    Args:
        config_file: The config file, which determines whether the data is for classification.
        folds: The folder with the files written by ``senet data split --folds K``.
        options: Alternating keys and values that override the config.
        images: The image folder of detection data.

    Raises:
        UserError: If there are no folds, or they don't fit the config.
    """
    suffix = ".csv" if is_classification(load_config(config_file, list(options))) else ".json"
    folder = Path(folds).absolute()
    found: dict[str, list[str]] = {}
    while (folder / f"fold{len(found)}_train{suffix}").is_file():
        name = f"fold{len(found)}"
        paths = {part: str(folder / f"{name}_{part}{suffix}") for part in ("train", "val")}
        names = dict(paths)
        data = []
        if suffix == ".json":
            names = {part: f"{name}_{part}" for part in paths}
            entries = [[names[part], paths[part], str(Path(images).absolute())] for part in paths]
            data = ["DATASETS.REGISTER", repr(entries)]
        for key, part in (("TRAIN", "train"), ("TEST", "val")):
            data += [f"DATASETS.{key}", repr((names[part],))]
        found[name] = data
    if len(found) < 2:
        raise UserError(
            f"{folds} contains {len(found)} folds for {config_file}; expected fold0_train{suffix}, "
            f"fold0_val{suffix}, fold1_train{suffix} and so on. Create them with senet data split "
            "--folds 5."
        )
    if suffix == ".json" and not images:
        raise UserError("The folds contain detection data. Give its image folder with --images.")
    return found


def mean_and_deviation(results: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation of each metric reported by all runs.

    It is the sample standard deviation (divided by n - 1), which is NaN for a single run.
    """
    rows = [metrics(result) for result in results]
    summary = {}
    for name in rows[0]:
        if all(name in row for row in rows):
            values = [row[name] for row in rows]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            summary[name] = (statistics.fmean(values), deviation)
    return summary


def runs_report(
    config_file: str, options: Sequence[str], results: dict[str, dict[str, Any]]
) -> str:
    """Format the results of runs, by name, as a table with one row per metric.

    If the paper reports a result for the model and data set, it is added below the table.
    """
    cfg = load_config(config_file, list(options))
    rows = {name: metrics(result) for name, result in results.items()}
    table = [
        [name, *(f"{row[name]:.3f}" for row in rows.values()), f"{mean:.3f}", f"{deviation:.3f}"]
        for name, (mean, deviation) in mean_and_deviation(list(results.values())).items()
    ]
    header = ["", *results, "mean", "std"]
    lines = [tabulate(table, header, tablefmt="pipe", disable_numparse=True, stralign="right")]
    published = None
    if is_classification(cfg) and cfg.DATASETS.TEST:
        model = backbone_name(cfg)
        published = published_on_cifar(cfg.DATASETS.TEST[0], model)
    if published:
        lines.append(f"{published.name}: {published.top1_error:.2f} ({published.source})")
    return "\n".join(lines)
