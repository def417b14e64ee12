"""What keeps a step with a number that is none from being taken, on any process of a job."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from senet_transfer.engine import signals as interruption
from senet_transfer.errors import RunError, UserError
from senet_transfer.utils.atomic_io import write_json

logger = logging.getLogger(__name__)

_LISTED = 20


class StepGuard:
    """Agrees with all processes on whether a step is taken.

    Detectron2 looks at the loss in the main process alone, after the step.

    Attributes:
        stops: whether any process was told to stop.
        skipped: steps so far that were not taken for numbers that are not finite.
    """

    def __init__(self, model: nn.Module, *, max_skips: int = 0, output_dir: str = ""):
        """
        Args:
            model: that is trained.
            max_skips: as many steps are left out; at one more, the run ends.
            output_dir: takes what reproduces such a step; empty for none.
        """
        self.model = model
        self.max_skips, self.output_dir = max_skips, output_dir
        self.stops, self.skipped = False, 0
        # A step that is left out has gone through the batch norms already.
        self._buffers = [buffer for buffer in model.buffers() if max_skips]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Notes the model's buffers, for a step that will not be taken."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def agree(self, error: Exception | None) -> str:
        """Tells all processes what went wrong in this one.

        Called where no process has begun an exchange that another one would wait for: before a
        batch goes into the model, and before its gradients are exchanged.

        Returns:
            What was not finite in the first process where something was not; empty if nothing.

        Raises:
            UserError: in all processes, if in one.
        """
        mistake = str(error) if isinstance(error, UserError) else ""
        fault = str(error) if isinstance(error, FloatingPointError) else ""
        told = comm.all_gather((mistake, fault, interruption.requested()))
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
        """Looks at the losses and at the gradients that the step would take.

        Args:
            losses: of this process.
            scale: of the gradients, where they are scaled. Above 1 they may overflow: the scaler
                lowers it, and leaves the step out.

        Returns:
            What is not finite in any process; empty if nothing.
        """
        bad = [f"{name} is {loss:g}" for name, loss in losses.items() if not math.isfinite(loss)]
        if not bad and scale <= 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            # The sum of squares is finite where all are, and cheap: on a CPU the largest value of
            # many small gradients takes ten times as long. Squares that overflow are no fault.
            finite = torch.nn.utils.get_total_norm(gradients).isfinite()
            if not finite and (names := self._bad_gradients()):
                bad.append(f"{len(names)} gradients are not finite, such as that of {names[0]}")
        if bad and comm.get_world_size() > 1:
            bad.append(f"in process {comm.get_rank()}")
        return next(filter(None, comm.all_gather(", ".join(bad))), "")

    def refuse(self, problem: str, iteration: int, batch: Any) -> None:
        """Leaves a step out, and writes what reproduces it.

        Raises:
            RunError: there were too many.
        """
        self.skipped += 1
        said = f"Iteration {iteration}: {problem}. The step was not taken."
        if self.output_dir:
            path = Path(self.output_dir, f"nonfinite_{iteration:07d}_rank{comm.get_rank()}.json")
            write_json(path, self._report(problem, iteration, batch))
            said += f" {path} has its batch."
        if self.skipped > self.max_skips:
            raise RunError(
                f"{said} The last checkpoint is from before; --resume repeats the step bit for "
                "bit. A learning rate too high for the batch is the usual cause: lower "
                "SOLVER.BASE_LR, warm up longer, or set SOLVER.CLIP_GRADIENTS. To leave out up to "
                "K such steps, set SOLVER.MAX_NONFINITE_STEPS K."
            )
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._before, strict=True):
                buffer.copy_(value)
        logger.warning("%s (%d of at most %d.)", said, self.skipped, self.max_skips)

    def _bad_gradients(self) -> list[str]:
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        return [name for name, gradient in named if not gradient.isfinite().all()]

    def _report(self, problem: str, iteration: int, batch: Any) -> dict[str, Any]:
        return {
            "problem": problem,
            "iteration": iteration,
            "rank": comm.get_rank(),
            "processes": comm.get_world_size(),
            # What torch was seeded by before the step; the rest follows from it and the weights.
            "torch_seed": torch.initial_seed(),
            "nonfinite_gradients": self._bad_gradients()[:_LISTED],
            "batch": _names(batch),
        }


def _names(batch: Any) -> Any:
    """What tells which images a batch is of."""
    if isinstance(batch, dict):
        batch = {key: value for key, value in batch.items() if key in ("key", "index", "label")}
        return {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in batch.items()}
    if isinstance(batch, list):
        return [{key: image.get(key) for key in ("file_name", "image_id")} for image in batch]
    return None
