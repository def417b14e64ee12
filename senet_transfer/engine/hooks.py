"""Hooks for the training loop."""

import contextlib
import logging
import math
import resource
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from senet_transfer.data.detection.loader import seed_generators
from senet_transfer.engine import signals
from senet_transfer.engine.checkpoints.checkpoint_history import verify_checkpoint
from senet_transfer.engine.checkpoints.checkpointer import UntaggedCheckpointer
from senet_transfer.engine.nonfinite_guard import StepGuard
from senet_transfer.engine.solver import PlateauLR, lower_is_better
from senet_transfer.errors import UserError
from senet_transfer.utils.private_api import copy_all, lerp_all

BEST_NAME = "model_best"
AVERAGE_NAME = "model_ema"

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

logger = logging.getLogger(__name__)


class StepTimer(HookBase):
    """Hook that times the training steps of this process. It must be the first hook.

    Time spent on evaluation and on saving checkpoints is not included.

    Attributes:
        seconds: The total time of all steps in seconds.
        steps: The number of timed steps.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._start = 0.0

    def before_step(self) -> None:
        """Start timing a step."""
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Add the step's time to the total."""
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class StepSeed(HookBase):
    """Hook that seeds all random number generators before each step.

    As a result, a resumed run draws the same random numbers as an uninterrupted run.

    Attributes:
        seed: The run's seed, which also determines the order and augmentation of the data.
    """

    def __init__(self, seed: int):
        """
        Args:
            seed: The value of ``SEED`` in the config, which is the same in all processes. A
                negative value selects a random seed, which is stored in the checkpoints. Each
                process combines the seed with its rank.
        """
        self._from_config = seed >= 0
        self.seed = seed if self._from_config else comm.shared_random_seed()

    def before_step(self) -> None:
        """Seed all random number generators from the run's seed, the iteration and the rank."""
        seed_generators(self.seed, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the seed from a checkpoint, unless the config specifies one."""
        if not self._from_config:
            self.seed = state["seed"]


class Resources(HookBase):
    """Hook that logs the elapsed time and the peak memory usage.

    ``elapsed_seconds`` is the time since the start of training. ``peak_memory_mb`` is the peak GPU
    memory in MiB or, on a CPU, the peak memory of this process excluding data loader workers.
    """

    def __init__(self, device: torch.device):
        """
        Args:
            device: The device of the model.
        """
        self.device = device

    def before_train(self) -> None:
        """Record the start time."""
        self.start = time.perf_counter()

    def after_step(self) -> None:
        """Log the elapsed time and the peak memory usage."""
        self.trainer.storage.put_scalars(
            elapsed_seconds=time.perf_counter() - self.start,
            peak_memory_mb=_peak_memory(self.device) / 2**20,
            smoothing_hint=False,
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


class DataWaits(HookBase):
    """Hook that logs ``data_time_share``, the fraction of training time spent waiting for data.

    The logged value is the mean over up to 20 steps, because on a GPU, host-device synchronisation
    makes some steps much longer than others. At the end of training, the fraction over the whole
    run is logged.
    """

    def __init__(self) -> None:
        self._seconds: deque[tuple[float, float]] = deque(maxlen=21)
        self._start = (0.0, 0.0)

    def before_train(self) -> None:
        """Store the initial values of the elapsed time and the time spent waiting for data."""
        self._start = self._now()
        self._seconds.append(self._start)

    def after_step(self) -> None:
        """Log the fraction of time spent waiting for data over the most recent steps."""
        self._seconds.append(self._now())
        share = _share(self._seconds[0], self._seconds[-1])
        self.trainer.storage.put_scalar("data_time_share", share, smoothing_hint=False)

    def after_train(self) -> None:
        """Log the fraction of time spent waiting for data over the whole run."""
        share = _share(self._start, self._now())
        logger.info("%.1f%% of the training time was spent waiting for data.", 100 * share)

    def _now(self) -> tuple[float, float]:
        return self.trainer.timer.seconds, self.trainer.waited


def _share(before: tuple[float, float], after: tuple[float, float]) -> float:
    seconds, waited = (b - a for a, b in zip(before, after, strict=True))
    return waited / seconds if seconds > 0 else 0.0


class FrozenStatistics(HookBase):
    """Hook that freezes the batch norm statistics during the last iterations.

    Frozen norms use their running statistics for normalisation and don't update them.
    """

    def __init__(self, model: nn.Module, iterations: int):
        """
        Args:
            model: The model whose batch norms are frozen.
            iterations: The number of final iterations during which the norms are frozen.
        """
        self.norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
        self.iterations = iterations

    def before_step(self) -> None:
        """Put the norms into evaluation mode; a preceding evaluation may have reset the mode."""
        if self.trainer.iter >= self.trainer.max_iter - self.iterations:
            for norm in self.norms:
                norm.eval()

    def after_train(self) -> None:
        """Put the norms back into training mode."""
        for norm in self.norms:
            norm.train()


class ModelEMA(HookBase):
    """Exponential moving average (EMA) of a model's weights and running statistics.

    After step t, the average becomes ``d * average + (1 - d) * weights`` with
    ``d = min(decay, (1 + t) / (10 + t))``. The smaller decay in early steps lets a short run forget
    its random initialisation.
    """

    def __init__(self, model: nn.Module, decay: float, guard: StepGuard | None = None):
        """
        Args:
            model: The model to average, without a wrapper for distributed training.
            decay: The maximum decay, between 0 and 1.
            guard: The guard that skips steps with non-finite values. If it was created with
                ``deferred=True``, the run may continue for some steps after the limit on skipped
                steps is exceeded. These steps do not update the average.
        """
        self.model = model
        self.decay = decay
        self.guard = guard
        # True if the trainer updates the average within its step.
        self.in_step = False
        self.steps = 0
        self.average: dict[str, Tensor] = {}

    def before_train(self) -> None:
        """Initialise the average with the model's weights, unless the run is resumed."""
        if not self.average:
            self.average = {k: v.detach().clone() for k, v in self._tensors().items()}

    def after_step(self) -> None:
        """Update the average, unless the training step has already updated it."""
        if not self.in_step:
            self.update(self.next_weight())

    def next_weight(self) -> float:
        """Count a step, and return the factor for the model's weights: 1 minus the step's decay."""
        self.steps += 1
        return 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))

    @torch.no_grad()
    def update(self, weight: float | Tensor) -> None:
        """Update the average without host-device synchronisation.

        Args:
            weight: The factor for the model's current weights, ``1 - d`` with the decay ``d`` of
                this step, as a float or as a scalar tensor on the device.
        """
        pairs = [(self.average[name], value) for name, value in self._tensors().items()]
        floats = [pair for pair in pairs if pair[1].is_floating_point()]
        counts = [pair for pair in pairs if not pair[1].is_floating_point()]
        halted = self.guard.halted if self.guard and self.guard.deferred else None
        averages, values = zip(*floats, strict=True)
        lerp_all(averages, values, weight, halted)
        if counts:
            copy_all(*zip(*counts, strict=True))

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Temporarily replace the model's weights with their exponential moving average."""
        own = {k: v.detach().clone() for k, v in self._tensors().items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        tensors = self._tensors()
        copy_all(list(tensors.values()), [values[name] for name in tensors])

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.steps = state["steps"]
        self.average = {
            name: state["average"][name].to(tensor.device, copy=True)
            for name, tensor in self._tensors().items()
        }


class _AfterEvaluation(HookBase, ABC):
    """Base class for hooks that use a metric after each evaluation by Detectron2's EvalHook."""

    def __init__(self, period: int, metric: str):
        self.period = period
        self.metric = metric

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._look()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._look()

    def _look(self) -> None:
        value, _ = self.trainer.storage.latest().get(self.metric, (math.nan, 0))
        # Only the main process has metrics.
        value = float(comm.all_gather(value)[0])
        if math.isfinite(value):
            self._observe(value)
        else:
            self._observe_none()

    @abstractmethod
    def _observe(self, value: float) -> None:
        """Process the metric of an evaluation; called only if its value is finite."""

    def _observe_none(self) -> None:
        """Log that an evaluation did not return a finite value of the metric."""
        known = self.trainer.storage.latest()
        if self.metric in known:
            logger.warning(
                "The metric %r is %s in this evaluation. The best model is not updated, a plateau "
                "learning rate schedule ignores the evaluation, and early stopping counts it as no "
                "improvement. A metric is NaN if the model detects no objects, or if the dataset "
                "contains none.",
                self.metric,
                known[self.metric][0],
            )
        elif comm.is_main_process():
            logger.warning(
                "The evaluation did not return the metric %r. Available metrics: %s.",
                self.metric,
                ", ".join(sorted(known)),
            )


class Plateau(_AfterEvaluation):
    """Hook that passes evaluation results to a :class:`PlateauLR` schedule."""

    def __init__(self, period: int, schedule: PlateauLR):
        """
        Args:
            period: The number of iterations between evaluations.
            schedule: The schedule that receives the metric.
        """
        super().__init__(period, schedule.metric)
        self.schedule = schedule

    def _observe(self, value: float) -> None:
        self.schedule.observe(value)


class BestModel(_AfterEvaluation):
    """Hook that saves the model with the best metric to ``model_best.pth``.

    Detectron2's BestCheckpointer loses the best value when a run is resumed, and marks its file as
    the checkpoint to resume from. This hook stores the best value in ``model_best.pth``, and leaves
    ``last_checkpoint`` unchanged.
    """

    def __init__(
        self,
        period: int,
        metric: str,
        checkpointer: UntaggedCheckpointer,
        average: ModelEMA | None = None,
    ):
        """
        Args:
            period: The number of iterations between evaluations.
            metric: The name under which the metric is logged.
            checkpointer: The checkpointer that saves the model.
            average: The averaged weights to save. If None, the model's own weights are saved.
        """
        super().__init__(period, metric)
        self.checkpointer = checkpointer
        self.average = average
        self.best: float | None = None

    def before_train(self) -> None:
        """Read the best value of the metric from ``model_best.pth`` if the run is resumed."""
        path = Path(self.checkpointer.save_dir, f"{BEST_NAME}.pth")
        if self.trainer.start_iter == 0 or not path.is_file():
            return
        if problem := verify_checkpoint(path):
            logger.error("The saved best model is corrupted and will be replaced: %s", problem)
            return
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if saved.get("metric") == self.metric:
            self.best = saved["value"]
            logger.info("Best %s so far: %.4f, saved in %s.", self.metric, self.best, path)

    def _observe(self, value: float) -> None:
        sign = 1 if lower_is_better(self.metric) else -1
        if self.best is not None and sign * value >= sign * self.best:
            return
        self.best = value
        if not comm.is_main_process():
            return
        about = {"metric": self.metric, "value": value, "iteration": self.trainer.iter}
        with self.average.in_place() if self.average else contextlib.nullcontext():
            self.checkpointer.save(BEST_NAME, **about)
        logger.info("Best %s so far: %.4f, saved to %s.pth.", self.metric, value, BEST_NAME)


class EarlyStopping(_AfterEvaluation):
    """Hook that ends training when a metric stops improving.

    The hook sets the trainer's ``max_iter`` to the current iteration, so later hooks save the final
    model. All processes stop at the same iteration.

    Attributes:
        waited: The number of evaluations since the metric last improved.
    """

    def __init__(self, period: int, metric: str, patience: int):
        """
        Args:
            period: The number of iterations between evaluations.
            metric: The name under which the metric is logged.
            patience: The number of evaluations without an improvement after which training ends.
        """
        super().__init__(period, metric)
        self.patience = patience
        self.best: float | None = None
        self.waited = 0

    @property
    def stops(self) -> bool:
        """True if training must end."""
        return self.waited >= self.patience

    def after_step(self) -> None:
        """Check the metric after an evaluation, and end training if it has stopped improving."""
        super().after_step()
        if self.stops:
            self.trainer.max_iter = self.trainer.iter + 1
            self.log()

    def after_train(self) -> None:
        """Do nothing: after the final evaluation, there is no training left to stop."""

    def log(self) -> None:
        """Log why training ends."""
        best = "none was finite" if self.best is None else f"the best was {self.best:.4f}"
        logger.warning(
            "Early stopping: %s has not improved for %d evaluations (TEST.PATIENCE); %s.",
            self.metric, self.waited, best,
        )  # fmt: skip

    def _observe(self, value: float) -> None:
        sign = 1 if lower_is_better(self.metric) else -1
        if self.best is None or sign * value < sign * self.best:
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def _observe_none(self) -> None:
        self.waited += 1  # BestModel has logged the reason.

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"metric": self.metric, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint, unless it belongs to a different metric."""
        if state["metric"] == self.metric:
            self.best, self.waited = state["best"], state["waited"]


class AverageSaver(HookBase):
    """Hook that saves the averaged model to ``model_ema.pth`` at the end of training."""

    def __init__(self, average: ModelEMA, checkpointer: UntaggedCheckpointer):
        """
        Args:
            average: The averaged weights to save.
            checkpointer: The checkpointer for the same model.
        """
        self.average = average
        self.checkpointer = checkpointer

    def after_train(self) -> None:
        """Save the averaged model unless training was interrupted."""
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            with self.average.in_place():
                self.checkpointer.save(AVERAGE_NAME, iteration=self.trainer.iter - 1)


class CheckpointSaver(PeriodicCheckpointer):
    """PeriodicCheckpointer that also saves a checkpoint before a graceful shutdown.

    This hook runs in all processes: if saving fails in the main process, all processes stop.
    """

    def after_step(self) -> None:
        """Save a checkpoint periodically, after the last iteration and before a graceful shutdown.

        Raises:
            UserError: In all processes, if the checkpoint can't be written.
        """
        iteration = self.trainer.iter
        self.max_iter = self.trainer.max_iter  # EarlyStopping may have changed max_iter.
        stops = self.trainer.stops
        periodic = (iteration + 1) % self.period == 0 or iteration + 1 >= self.max_iter
        if not (periodic or stops):
            return
        problem = ""
        try:
            self.step(iteration)
            if not periodic:
                self.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
        except UserError as error:
            problem = str(error)
        # All processes wait here until the file is written: after SIGTERM, the machine may be
        # reclaimed soon.
        if problem := "".join(comm.all_gather(problem)):
            failure = UserError(problem)
            failure.on_all_ranks = True
            raise failure


class GracefulStop(HookBase):
    """Hook for a graceful shutdown after SIGTERM or Ctrl-C. It must be the last hook."""

    def after_step(self) -> None:
        """Exit with status 75 if any process received a signal during this step.

        By then, :class:`CheckpointSaver` has saved a checkpoint.
        """
        if self.trainer.stops and self.trainer.iter + 1 < self.trainer.max_iter:
            logger.warning(
                "Stopped after iteration %d and saved a checkpoint. Continue with --resume.",
                self.trainer.iter,
            )
            raise SystemExit(signals.STATUS)
