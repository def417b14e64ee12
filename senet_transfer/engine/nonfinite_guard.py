"""Guard that skips training steps with a non-finite loss or gradient on all ranks."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from senet_transfer.engine import signals
from senet_transfer.errors import RunError, UserError
from senet_transfer.utils.atomic_io import write_json

logger = logging.getLogger(__name__)

_LISTED = 20


class StepGuard:
    """Guard that makes all processes either apply or skip an optimizer step.

    In contrast, Detectron2 checks the loss in the main process only, and after the update.

    Attributes:
        stops: True if any process has received a request to stop.
        skipped: The number of steps skipped so far because of non-finite values.
    """

    def __init__(self, model: nn.Module, *, max_skips: int = 0, output_dir: str = ""):
        """
        Args:
            model: The model to train.
            max_skips: The number of steps to skip before ending the run with an error.
            output_dir: The folder for reports about skipped steps, which help to reproduce them.
                If empty, no reports are written.
        """
        self.model = model
        self.max_skips, self.output_dir = max_skips, output_dir
        self.stops, self.skipped = False, 0
        # By the time a step is skipped, its forward pass has updated the batch norm buffers.
        self._buffers = [buffer for buffer in model.buffers() if max_skips]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Copy the model's buffers so that they can be restored if the step is skipped."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def agree(self, error: Exception | None) -> str:
        """Gather the errors of all processes, so that all of them react in the same way.

        All processes must call this method outside other collective operations: before the
        forward pass of a batch, and before its gradients are reduced.

        Args:
            error: The error raised in this process, or None.

        Returns:
            A description of the non-finite value on the lowest rank that found one, or "" if all
            values are finite.

        Raises:
            UserError: In all processes, if any process passes a UserError.
        """
        mistake = str(error) if isinstance(error, UserError) else ""
        fault = str(error) if isinstance(error, FloatingPointError) else ""
        told = comm.all_gather((mistake, fault, signals.requested()))
        mistakes, faults, requests = zip(*told, strict=True)
        self.stops = any(requests)
        if any(mistakes):
            if isinstance(error, UserError):
                stop = error
            else:
                stop = UserError(f"Another process stopped: {next(filter(None, mistakes))}")
            stop.on_all_ranks = True
            raise stop
        return next(filter(None, faults), "")

    def check(self, losses: dict[str, Tensor], scale: float) -> str:
        """Check that the losses and gradients are finite in all processes.

        Args:
            losses: This process's losses by name.
            scale: The loss scale, or 1 without a gradient scaler. If the scale is above 1, the
                gradients are not checked: scaled gradients may overflow, and the scaler then skips
                the step and reduces the scale.

        Returns:
            A description of the non-finite value on the lowest rank that found one, or "" if all
            values are finite.
        """
        bad = [f"{name} is {loss:g}" for name, loss in losses.items() if not math.isfinite(loss)]
        if not bad and scale <= 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            # The total norm is cheap to check: on a CPU, the maximum over many small gradients
            # takes ten times as long. Because the squares can overflow even if all gradients are
            # finite, a non-finite norm is followed by a check of each gradient.
            finite = torch.nn.utils.get_total_norm(gradients).isfinite()
            if not finite and (names := self._bad_gradients()):
                bad.append(f"{len(names)} gradients are not finite, such as that of {names[0]}")
        if bad and comm.get_world_size() > 1:
            bad.append(f"in process {comm.get_rank()}")
        return next(filter(None, comm.all_gather(", ".join(bad))), "")

    def refuse(self, problem: str, iteration: int, batch: Any) -> None:
        """Skip a step: restore the model's buffers, and write a report for reproducing the step.

        Args:
            problem: A description of the non-finite value.
            iteration: The number of the skipped iteration.
            batch: This process's batch.

        Raises:
            RunError: If more than ``max_skips`` steps have been skipped.
        """
        self.skipped += 1
        said = f"Iteration {iteration}: {problem}. The step was skipped."
        if self.output_dir:
            path = Path(self.output_dir, f"nonfinite_{iteration:07d}_rank{comm.get_rank()}.json")
            write_json(path, self._report(problem, iteration, batch))
            said += f" {path} lists its batch."
        if self.skipped > self.max_skips:
            raise RunError(
                f"{said} Resuming with --resume repeats the steps since the last checkpoint and "
                "ends in the same way. The usual cause is a learning rate that is too high for "
                "the batch size: reduce SOLVER.BASE_LR, use a longer warm-up, or set "
                "SOLVER.CLIP_GRADIENTS. To skip up to K such steps, set SOLVER.MAX_NONFINITE_STEPS "
                "to K."
            )
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._before, strict=True):
                buffer.copy_(value)
        logger.warning(
            "%s Steps skipped so far: %d of at most %d.", said, self.skipped, self.max_skips
        )

    def _bad_gradients(self) -> list[str]:
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        return [name for name, gradient in named if not gradient.isfinite().all()]

    def _report(self, problem: str, iteration: int, batch: Any) -> dict[str, Any]:
        return {
            "problem": problem,
            "iteration": iteration,
            "rank": comm.get_rank(),
            "processes": comm.get_world_size(),
            # The seed of this step, which determines all of its random numbers.
            "torch_seed": torch.initial_seed(),
            "nonfinite_gradients": self._bad_gradients()[:_LISTED],
            "batch": _names(batch),
        }


def _names(batch: Any) -> Any:
    """Return the keys and labels, or the file names and ids, of a batch's images."""
    if isinstance(batch, dict):
        batch = {key: value for key, value in batch.items() if key in ("key", "index", "label")}
        return {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in batch.items()}
    if isinstance(batch, list):
        return [{key: image.get(key) for key in ("file_name", "image_id")} for image in batch]
    return None
