"""Execution of several training runs; finished runs are skipped, interrupted runs are resumed.

Each run has a config file, options that override the config, and a separate folder. The folder
contains the initial config in ``run.json`` and, after training, the results in ``results.json``.
"""

import contextlib
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from senet_transfer.config import config_items, get_senet_config, is_classification
from senet_transfer.config.load import load_config
from senet_transfer.engine import signals
from senet_transfer.engine.checkpoints.checkpoint_history import checkpoints
from senet_transfer.engine.results import metrics
from senet_transfer.engine.train import RESULTS
from senet_transfer.errors import UserError
from senet_transfer.evaluation.paper_results import published_on_cifar
from senet_transfer.models.build import backbone_name
from senet_transfer.utils.atomic_io import write_json
from senet_transfer.utils.environment import origin
from senet_transfer.utils.folder_lock import LOCK, only_writer
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.utils.text import first_of

_RECORD = "run.json"
ORIGIN = "origin.json"  # the file with the machine and the commit of a run
_WEIGHTS = "SHA-256 of MODEL.WEIGHTS"

# Seconds between two checks of a run's time limit.
_POLL = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        config_file: The config file, as for ``--config-file``.
        options: Alternating keys and values that override the config.
        output_dir: The run's folder, which must not be shared with other runs. This folder
            overrides ``OUTPUT_DIR``.
    """

    config_file: str
    options: tuple[str, ...]
    output_dir: Path


class TimeLimit:
    """Time limit for several training runs, which also expires on SIGTERM or Ctrl-C.

    Attributes:
        expired: True when the runs must stop.
    """

    def __init__(self, minutes: float | None = None):
        """
        Args:
            minutes: The limit in minutes, or None for no limit.
        """
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._signalled = threading.Event()

    @property
    def expired(self) -> bool:  # noqa: D102 - described in the class
        return self._signalled.is_set() or time.monotonic() >= self._end

    @contextlib.contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Make the limit expire on SIGTERM or Ctrl-C inside the context (main thread only)."""
        before = {
            number: signal.signal(number, lambda *_: self._signalled.set())
            for number in signals.SIGNALS
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_all(
    runs: Sequence[Run],
    *,
    jobs: int = 1,
    minutes: float | None = None,
    on_finish: Callable[[Run], object] = lambda _: None,
    **arguments: Any,
) -> list[dict[str, Any] | None]:
    """Execute several training runs as ``senet train`` does, skipping runs that are finished.

    Args:
        runs: The runs, in the order in which to start them.
        jobs: The number of runs to execute at the same time.
        minutes: The time limit in minutes. When the limit expires, the current runs save a
            checkpoint and stop, and no further runs are started. SIGTERM and Ctrl-C have the same
            effect.
        on_finish: A function that is called in the calling thread with each finished run, including
            runs that were finished earlier.
        arguments: The keyword arguments ``flags`` and ``quiet``. ``flags`` contains further
            command-line arguments, such as ``("--num-gpus", "8")``, which may differ when a run is
            resumed. If ``quiet`` is True, the log is only written to ``log.txt``.

    Returns:
        The content of each run's ``results.json``, or None for an unfinished run. The file contains
        the metrics of each task, as in ``{"classification": {"top1_error": 6.4, ...}}``. The entry
        ``"training"`` contains ``"iterations"`` and ``"seconds_per_iteration"``. The time per
        iteration excludes evaluation and checkpointing, and is measured since the run was last
        resumed.

    Raises:
        UserError: If several runs have the same folder, or if a run failed. A run fails if its
            config is invalid, if its folder contains a different run or is used by another process,
            or if its training or ``on_finish`` fails. All remaining runs are executed before the
            error is raised.
    """
    if len({run.output_dir for run in runs}) < len(runs):
        raise UserError(
            "Several runs have the same output folder, because a seed or the name of a config "
            "occurs twice. Remove the duplicate."
        )
    limit = TimeLimit(minutes)
    results: list[dict[str, Any] | None] = []
    failures = []
    with limit.ended_by_signals(), ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(_train, run, limit=limit, share=jobs, **arguments) for run in runs]
        for run, future in zip(runs, started, strict=True):
            try:
                results.append(future.result())
                if results[-1] is not None:
                    on_finish(run)
            except UserError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    return results


def _train(
    run: Run, limit: TimeLimit, *, flags: Sequence[str] = (), quiet: bool = False, share: int = 1
) -> dict[str, Any] | None:
    """Execute a training run, and return its results, or None if the time limit expired first.

    Args:
        run: The run.
        limit: The time limit. When it expires, the run saves a checkpoint and stops.
        flags: See :func:`run_all`.
        quiet: See :func:`run_all`.
        share: The number of runs that share the CPU cores.
    """
    output_dir = run.output_dir
    options = [*run.options, "OUTPUT_DIR", str(output_dir)]
    cfg = load_config(run.config_file, options)
    config = {key: repr(value) for key, value in config_items(cfg)}
    if os.path.isfile(cfg.MODEL.WEIGHTS):
        config[_WEIGHTS] = file_sha256(cfg.MODEL.WEIGHTS)
    _check_same(output_dir, config)
    found = finished(output_dir)
    if found is not None:
        logger.info("The run in %s is already finished.", output_dir)
        return found
    if limit.expired:
        return None
    command = [sys.executable, "-m", "senet_transfer.cli.train", "--config-file", run.config_file]
    with only_writer(output_dir) as lock:
        # A failed attempt without a checkpoint may still have left files of this run.
        resume = ["--resume"] if checkpoints(output_dir) else ["--overwrite"]
        write_json(output_dir / ORIGIN, origin(on_gpu=cfg.MODEL.DEVICE != "cpu"))
        words = [*command, *flags, *resume, *options]
        process = _start(words, quiet=quiet, share=share, lock=lock.fileno())
        terminated = False
        while (status := process.poll()) is None:
            if limit.expired and not terminated:
                process.terminate()
                terminated = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
    found = finished(output_dir)
    # Before training starts, the process doesn't handle signals, so a signal may end it.
    stopped = (signals.STATUS, -signal.SIGTERM, -signal.SIGINT)
    if found is None and limit.expired and status in stopped:
        return None
    if status or found is None:
        raise UserError(
            f"The run in {output_dir} ended with exit status {status} before it finished. See the "
            f"log in {output_dir / 'log.txt'}. Repeat the command to resume the run."
        )
    return found


def _start(command: list[str], *, quiet: bool, share: int, lock: int) -> subprocess.Popen[bytes]:
    """Start training in a separate process, as Detectron2's loggers and registries are global.

    The new process inherits the lock on the run's folder, and holds it even if this process is
    killed.
    """
    threads = max(len(os.sched_getaffinity(0)) // share, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ} if share > 1 else None
    stdout = subprocess.DEVNULL if quiet else None
    return subprocess.Popen(command, stdout=stdout, env=environment, pass_fds=(lock,))


def finished(output_dir: str | Path) -> dict[str, Any] | None:
    """Return a training run's results, or None if the run isn't finished."""
    path = Path(output_dir) / RESULTS
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    # Evaluation without training also writes a file with this name.
    return found if "training" in found else None


def initial_weights(output_dir: Path) -> str | None:
    """Return the SHA-256 of a run's initial weights, or None if they are not from a local file."""
    hashed = json.loads((output_dir / _RECORD).read_text()).get(_WEIGHTS)
    return None if hashed is None else str(hashed)


def _check_same(output_dir: Path, config: dict[str, str]) -> None:
    """Check that a folder is empty or contains this run, and record the config of a new run."""
    record = output_dir / _RECORD
    if record.is_file():
        # For keys that were added since the run was started, assume the default values.
        defaults = {key: repr(value) for key, value in config_items(get_senet_config())}
        begun = {**defaults, **json.loads(record.read_text())}
        other = [key for key in begun.keys() | config.keys() if begun.get(key) != config.get(key)]
        if _WEIGHTS in other and not {_WEIGHTS} <= begun.keys() & config.keys():
            # The initial weight file of a finished run may have been deleted.
            other.remove(_WEIGHTS)
        if other:
            first = sorted(other)[0]
            raise UserError(
                f"{output_dir} contains a run with a different config. The configs differ in "
                f"{first_of(sorted(other), 5)}: {first} was {begun.get(first)} and is now "
                f"{config.get(first)}. Choose a different output folder, or delete this folder."
            )
        return
    if output_dir.is_dir() and any(path.name != LOCK for path in output_dir.iterdir()):
        raise UserError(
            f"{output_dir} contains files but no {_RECORD}, so the run in this folder can't be "
            "identified. Choose a different output folder, or empty this folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(record, config)


def seed_runs(
    config_file: str, seeds: Iterable[int], options: Sequence[str], output_dir: str | Path
) -> list[Run]:
    """Return one run per seed, in ``output_dir/seed<N>``.

    Args:
        config_file: The config file.
        seeds: The values for ``SEED``.
        options: Alternating keys and values that override the config.
        output_dir: The parent folder of all runs.
    """
    return [
        Run(config_file, (*options, "SEED", str(seed)), Path(output_dir) / f"seed{seed}")
        for seed in seeds
    ]


def fold_runs(
    config_file: str,
    folds: Mapping[str, Sequence[str]],
    options: Sequence[str],
    output_dir: str | Path,
) -> list[Run]:
    """Return one run per fold, in ``output_dir/fold<N>``.

    Args:
        config_file: The config file.
        folds: The config options of each fold, returned by :func:`fold_options`.
        options: Alternating keys and values that override the config.
        output_dir: The parent folder of all runs.
    """
    return [
        Run(config_file, (*options, *data), Path(output_dir) / name) for name, data in folds.items()
    ]


def fold_options(
    config_file: str, folds: str | Path, options: Sequence[str], *, images: str | Path = ""
) -> dict[str, list[str]]:
    """Return the config options that select the data of each fold.

    Args:
        config_file: The config file of a classifier or a detector.
        folds: The folder with the files written by ``senet data split --folds K``.
        options: Alternating keys and values that override the config.
        images: The image folder of detection data.

    Raises:
        UserError: If the folder contains fewer than two folds for the task of the config, or if
            the image folder of detection data is not specified.
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
        raise UserError("The folds contain detection data. Pass the image folder with --images.")
    return found


def mean_and_deviation(results: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation of each metric reported by all runs.

    The deviation is the sample standard deviation (with divisor n - 1), which is NaN for a single
    run.
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
    """Format the results of runs as a table with one row per metric and one column per run.

    If the paper reports a result for the model and dataset, it is added below the table.
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
