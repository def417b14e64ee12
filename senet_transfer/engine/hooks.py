"""Hooks of the train loop, one for each thing that happens around a step."""

import contextlib
import logging
import math
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from senet_transfer.data.detection.loader import seed_generators
from senet_transfer.engine import signals as interruption
from senet_transfer.engine.checkpoints.checkpoint_history import verify_checkpoint
from senet_transfer.engine.checkpoints.checkpointer import UntaggedCheckpointer
from senet_transfer.engine.solver import PlateauLR, lower_is_better
from senet_transfer.errors import UserError

BEST_NAME = "model_best"
AVERAGE_NAME = "model_ema"

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

logger = logging.getLogger(__name__)


class StepTimer(HookBase):
    """Timer of the steps since the run began or was resumed; the first of the hooks.

    Evaluation and saving are not counted.

    Attributes:
        seconds: total time of the steps.
        steps: number of steps.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._start = 0.0

    def before_step(self) -> None:
        """Start timing a step."""
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Add the time of the step."""
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class StepSeed(HookBase):
    """Seeds all generators before each step: a resumed run draws what the unbroken one draws.

    Attributes:
        seed: of the run; order and augmentation of its data follow from it, too.
    """

    def __init__(self, seed: int):
        """
        Args:
            seed: as in the config, the same in all processes; each draws numbers of its own from
                it. Below 0: drawn here, and kept by checkpoints.
        """
        self._from_config = seed >= 0
        self.seed = seed if self._from_config else comm.shared_random_seed()

    def before_step(self) -> None:
        """Seeds by seed, iteration and rank."""
        seed_generators(self.seed, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, unless the config says otherwise."""
        if not self._from_config:
            self.seed = state["seed"]


class Resources(HookBase):
    """Logs ``elapsed_seconds`` since training began and the ``peak_memory_mb`` of this process.

    The memory is the GPU's where one is used; else the process's own, without those that load data.
    """

    def before_train(self) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()

    def after_step(self) -> None:
        """Logs both."""
        self.trainer.storage.put_scalars(
            elapsed_seconds=time.perf_counter() - self.start,
            peak_memory_mb=_peak_memory() / 2**20,
            smoothing_hint=False,
        )


def _peak_memory() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


class FrozenStatistics(HookBase):
    """Batch norms normalise by their running statistics, and keep them, in the last iterations."""

    def __init__(self, model: nn.Module, iterations: int):
        """
        Args:
            model: with batch norms.
            iterations: how many, at the end of the run.
        """
        self.norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
        self.iterations = iterations

    def before_step(self) -> None:
        """Sets the norms; an evaluation since the last step has set them back."""
        if self.trainer.iter >= self.trainer.max_iter - self.iterations:
            for norm in self.norms:
                norm.eval()

    def after_train(self) -> None:
        """Leaves the norms as they were."""
        for norm in self.norms:
            norm.train()


class ModelEMA(HookBase):
    """Exponential moving average (EMA) of a model's weights and running statistics.

    After step t the average is ``d * average + (1 - d) * weights`` with
    ``d = min(decay, (1 + t) / (10 + t))``, so that a short run forgets its random start.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: the trained model, without a wrapper for distributed training.
            decay: largest share of the average that a step keeps, 0-1.
        """
        self.model = model
        self.decay = decay
        self.steps = 0
        self.average: dict[str, Tensor] = {}

    def before_train(self) -> None:
        """Start from the model's weights, unless the run is resumed."""
        if not self.average:
            self.average = {k: v.detach().clone() for k, v in self._tensors().items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in self._tensors().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average inside the context, and its own weights back after it."""
        own = {k: v.detach().clone() for k, v in self._tensors().items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.steps = state["steps"]
        self.average = {
            name: state["average"][name].to(tensor.device, copy=True)
            for name, tensor in self._tensors().items()
        }


class _AfterEvaluation(HookBase, ABC):
    """Does something with a metric whenever Detectron2's EvalHook has evaluated."""

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
        # Metrics are known to the main process alone.
        value = float(comm.all_gather(value)[0])
        if math.isfinite(value):
            self._observe(value)
            return
        logger.warning(
            "There is no metric %r after an evaluation. Known: %s.",
            self.metric, ", ".join(sorted(self.trainer.storage.latest())),
        )  # fmt: skip

    @abstractmethod
    def _observe(self, value: float) -> None:
        """Takes the metric's value of an evaluation, which is finite."""


class Plateau(_AfterEvaluation):
    """Tells a :class:`PlateauLR` of evaluations."""

    def __init__(self, period: int, schedule: PlateauLR):
        """
        Args:
            period: of evaluation, in iterations.
            schedule: to tell.
        """
        super().__init__(period, schedule.metric)
        self.schedule = schedule

    def _observe(self, value: float) -> None:
        self.schedule.observe(value)


class BestModel(_AfterEvaluation):
    """Keeps the model of the best evaluation in ``model_best.pth``.

    Detectron2's BestCheckpointer forgets what it had when a run is resumed, and makes its file the
    one to resume from. This one asks the file itself, which says what it is.
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
            period: of evaluation, in iterations.
            metric: the name by which it is logged.
            checkpointer: saves the model.
            average: what was evaluated in the model's place.
        """
        super().__init__(period, metric)
        self.checkpointer = checkpointer
        self.average = average
        self.best: float | None = None

    def before_train(self) -> None:
        """Looks for the best model so far, where the run is resumed."""
        path = Path(self.checkpointer.save_dir, f"{BEST_NAME}.pth")
        if self.trainer.start_iter == 0 or not path.is_file():
            return
        if problem := verify_checkpoint(path):
            logger.error("The best model so far is lost, the next one takes its place: %s", problem)
            return
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if saved.get("metric") == self.metric:
            self.best = saved["value"]
            logger.info("Best %s so far: %.4f, in %s.", self.metric, self.best, path)

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
        logger.info("Best %s so far: %.4f, kept in %s.pth.", self.metric, value, BEST_NAME)


class AverageSaver(HookBase):
    """Writes the averaged model to ``model_ema.pth`` when training has ended."""

    def __init__(self, average: ModelEMA, checkpointer: UntaggedCheckpointer):
        """
        Args:
            average: to save.
            checkpointer: of the same model.
        """
        self.average = average
        self.checkpointer = checkpointer

    def after_train(self) -> None:
        """Saves, unless training was broken off."""
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            with self.average.in_place():
                self.checkpointer.save(AVERAGE_NAME, iteration=self.trainer.iter - 1)


class CheckpointSaver(PeriodicCheckpointer):
    """Detectron2's PeriodicCheckpointer, which also saves before a graceful shutdown.

    It runs in all processes, so that a failure of the main one to save ends the run in all.
    """

    def after_step(self) -> None:
        """Saves periodically, at the end, and when the run stops after this step."""
        iteration = self.trainer.iter
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
        # All wait here for the file: who is told to stop may be gone soon after.
        if problem := "".join(comm.all_gather(problem)):
            failure = UserError(problem)
            failure.on_all_ranks = True
            raise failure


class GracefulStop(HookBase):
    """Graceful shutdown on SIGTERM or Ctrl-C, at the end of a step; the last of the hooks."""

    def after_step(self) -> None:
        """Exit with status 75 if any process was asked to stop in this step.

        Checkpoints and evaluations that are due after the step have run by then.
        """
        if self.trainer.stops and self.trainer.iter + 1 < self.trainer.max_iter:
            logger.warning(
                "Stopped after iteration %d, saved. Go on with --resume.", self.trainer.iter
            )
            raise SystemExit(interruption.STATUS)
