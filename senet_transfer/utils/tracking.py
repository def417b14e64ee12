"""Writers that send the metrics of a run to experiment trackers (config key ``TRACKING``).

The tracker packages read their own environment variables, such as ``WANDB_PROJECT``,
``WANDB_MODE``, ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``.
"""

import importlib
import json
import os
import re
from abc import abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

from senet_transfer.errors import UserError, check_choice
from senet_transfer.utils.atomic_io import write_json

FILE = "tracking.json"
_WINDOW = 20  # Number of steps over which losses are smoothed, the same as for TensorBoard.


def build_tracking_writers(names: list[str], output_dir: str, config: str) -> list[EventWriter]:
    """Start or resume a run in each tracker, and return the writers for the metrics.

    The run id of each tracker is stored in ``tracking.json`` in the output folder. If training is
    resumed, the tracker runs with these ids are resumed, too.

    Args:
        names: Names of the trackers; see :data:`TRACKERS`.
        output_dir: The output folder.
        config: The run's config as YAML, to be stored with the run.
    """
    if not names:
        return []
    path = Path(output_dir, FILE)
    ids = json.loads(path.read_text()) if path.is_file() else {}
    writers = [TRACKERS[name](output_dir, config, ids.get(name)) for name in names]
    write_json(path, ids | {name: w.run_id for name, w in zip(names, writers, strict=True)})
    return [*writers]


def check_trackers(names: list[str]) -> None:
    """Raise a UserError if a tracker is unknown or its package is not installed."""
    for name in names:
        check_choice("TRACKING", name, tuple(TRACKERS))
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"TRACKING contains {name!r}, but the package {name} can't be imported: {error}. "
                f"Install it (pip install {name}), or remove it from TRACKING."
            ) from error


class _Tracker(EventWriter):
    """Base class for writers that send only the metrics added since the previous write."""

    run_id: str

    def __init__(self) -> None:
        self._last = -1

    def write(self) -> None:
        """Send the new metrics, each with the step at which it was computed."""
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, step) in get_event_storage().latest_with_smoothing_hint(_WINDOW).items():
            if step > self._last:
                new[step][name] = value
        for step in sorted(new):
            self._send(new[step], step)
        self._last = max(new, default=self._last)

    @abstractmethod
    def _send(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of one step to the tracker."""


class WandbTracker(_Tracker):
    """Writer for Weights & Biases."""

    def __init__(self, output_dir: str, config: str, run_id: str | None):
        """
        Args:
            output_dir: The folder for the local files of wandb.
            config: The run's config as YAML.
            run_id: The id of the run to resume; None to start a new run.
        """
        super().__init__()
        wandb: Any = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", "senet_transfer")
        self._run = wandb.init(
            project=project, dir=output_dir, id=run_id, resume="allow", config={"yaml": config}
        )
        self.run_id = self._run.id

    def _send(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflowTracker(_Tracker):
    """Writer for MLflow. Characters that MLflow does not accept in names are replaced by ``_``."""

    def __init__(self, output_dir: str, config: str, run_id: str | None):
        """
        Args:
            output_dir: The output folder of the run. Its name becomes the name of the run.
            config: The run's config as YAML.
            run_id: The id of the run to resume; None to start a new run.
        """
        super().__init__()
        self._mlflow: Any = importlib.import_module("mlflow")
        name = os.path.basename(os.path.abspath(output_dir))
        self.run_id = self._mlflow.start_run(run_id=run_id, run_name=name).info.run_id
        self._mlflow.log_text(config, "config.yaml")

    def _send(self, metrics: dict[str, float], step: int) -> None:
        accepted = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(accepted, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._mlflow.end_run()


TRACKERS: dict[str, type[WandbTracker] | type[MLflowTracker]] = {
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
}
