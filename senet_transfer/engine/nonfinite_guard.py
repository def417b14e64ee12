"""Guard that skips a training step on all ranks if a loss or gradient is non-finite on any rank.

To avoid host-device synchronisation in each step, the decision to skip a step is made on the
device, and the host reads the decisions of several steps together. Once the number of skipped steps
exceeds the limit, all later steps are skipped as well until the host reads the decisions and raises
an error.
"""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn

from senet_transfer.engine import signals
from senet_transfer.errors import RunError, UserError
from senet_transfer.utils.atomic_io import write_json
from senet_transfer.utils.private_api import copy_all, cpu_group, norms_of

logger = logging.getLogger(__name__)

_LISTED = 20


@dataclass
class Step:
    """Description of a training step, and its results, which are still on the device.

    Attributes:
        iteration: The iteration index.
        data_time: The time spent waiting for the batch, in seconds.
        batch: The fields that identify this process's images; see :func:`describe_batch`.
        seed: The seed of the step, which determines all of its random numbers.
        problem: The message of the FloatingPointError that the model raised in any process. Empty
            if there was no such error.
        losses: The names of the losses in this process.
        gradients: The names of the parameters that have gradients.
        values: A float64 tensor on the device. The first value is 1 if the step was skipped because
            of non-finite values in any process, otherwise 0. The second value is 1 if the gradients
            were checked, otherwise 0. The other values are the losses.
        norms: The norms of the gradients, on the device.
    """

    iteration: int
    data_time: float
    batch: Any
    seed: int
    problem: str = ""
    losses: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    values: Tensor = field(default_factory=lambda: torch.zeros(2))
    norms: Tensor = field(default_factory=lambda: torch.zeros(0))


class StepGuard:
    """Guard that makes all processes either apply or skip an optimizer step.

    In contrast, Detectron2 checks the loss in the main process only, and after the update.

    Attributes:
        stops: True if any process has received a request to stop.
        skipped: The number of steps skipped because of non-finite values. Steps whose results are
            still on the device are not counted yet.
        halted: Tensor on the device: 1 if more steps were skipped than are allowed, otherwise 0.
    """

    def __init__(
        self, model: nn.Module, *, max_skips: int = 0, output_dir: str = "", deferred: bool = False
    ):
        """
        Args:
            model: The model to train.
            max_skips: The number of steps that may be skipped. If more are skipped, the run ends
                with an error.
            output_dir: The folder for reports that help to reproduce skipped steps. If empty, no
                reports are written.
            deferred: If True, only :meth:`report` reads values from the device. All other methods
                avoid host-device synchronisation.
        """
        self.model = model
        self.max_skips, self.output_dir, self.deferred = max_skips, output_dir, deferred
        self.stops = False
        device = next(model.parameters()).device
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self.halted = torch.zeros((), device=device)
        self.skipped = 0
        # By the time a step is skipped, its forward pass has updated the batch norm buffers.
        buffers = [*model.buffers()] if deferred or max_skips else []
        types = {buffer.dtype for buffer in buffers}
        self._buffers = [[b for b in buffers if b.dtype == dtype] for dtype in types]
        self._before: list[Tensor] = []

    @property
    def skipped(self) -> int:
        return self._skipped

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skipped = count
        self._count.fill_(count)
        self.halted.copy_(self._count > self.max_skips)

    def remember(self) -> None:
        """Copy the model's buffers so that they can be restored if the step is skipped."""
        self._before = [_joined(buffers) for buffers in self._buffers]

    def agree(self, error: Exception | None) -> str:
        """Exchange the errors of all processes, so that all of them react in the same way.

        All processes must call this method outside other collective operations: before the
        forward pass of a batch, and before its gradients are reduced. The messages are exchanged
        only if there is an error.

        Args:
            error: The error raised in this process, or None.

        Returns:
            The message of the FloatingPointError on the lowest rank that passes one, or "" if no
            rank does.

        Raises:
            UserError: In all processes, if any process passes a UserError.
        """
        message = str(error) or repr(error)
        mistake = message if isinstance(error, UserError) else ""
        fault = message if isinstance(error, FloatingPointError) else ""
        flags = [error is not None, signals.requested()]
        if comm.get_world_size() > 1:
            shared = torch.tensor(flags, dtype=torch.uint8)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=cpu_group())
            flags = list(map(bool, shared))
        failed, self.stops = flags
        if not failed:
            return ""
        mistakes, faults = zip(*comm.all_gather((mistake, fault)), strict=True)
        if any(mistakes):
            if isinstance(error, UserError):
                stop = error
            else:
                stop = UserError(f"Another process stopped: {next(filter(None, mistakes))}")
            stop.on_all_ranks = True
            raise stop
        return next(filter(None, faults), "")

    @torch.no_grad()
    def check(self, step: Step, losses: dict[str, Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Check on the device that the losses and gradients are finite in all processes.

        If they are not, restore the model's buffers. All processes must call this method together.

        Args:
            step: The current step. This method sets its ``losses``, ``gradients``, ``values`` and
                ``norms``.
            losses: This process's losses by name.
            scale: The loss scale, or 1 without a gradient scaler. If the scale is above 1, only the
                losses are checked: scaled gradients may overflow, and the scaler then skips the
                step and reduces the scale.

        Returns:
            Two boolean tensors: whether the step is skipped, and whether the gradients overflow.
        """
        device = self._count.device
        values = [loss.reshape(()).to(device, non_blocking=True) for loss in losses.values()]
        step.losses = list(losses)
        found = torch.stack(values).double() if values else self._count.new_zeros(0).double()
        step.gradients, step.norms = self._norms()
        overflow = ~step.norms.isfinite().all()
        checked = scale <= 1
        bad = ~found.isfinite().all() | (overflow & checked)
        if step.problem:
            bad = torch.ones_like(bad)
        if comm.get_world_size() > 1:
            bad = bad.int()
            dist.all_reduce(bad, dist.ReduceOp.MAX)
            bad = bad.bool()
        skip = bad | (self._count > self.max_skips)
        counted = bad & (self._count <= self.max_skips)
        self._count += counted
        self.halted.copy_(self._count > self.max_skips)
        step.values = torch.cat([torch.stack([counted, checked]).double(), found])
        if self.deferred or skip:
            self._restore(skip)
        return skip, overflow

    def _norms(self) -> tuple[list[str], Tensor]:
        """Return the names of parameters with gradients, and the norms of these gradients.

        A norm is finite if and only if its gradient is finite. The norms are maximum norms if
        ``deferred`` is True or an L2 norm overflows, and L2 norms otherwise.
        """
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        if not named:
            return [], self.halted.new_zeros(0)
        names, gradients = zip(*named, strict=True)
        if not self.deferred:
            # On a CPU, the sum of squares takes a tenth of the time of the maximum. However, it can
            # overflow even if all values are finite.
            norms = norms_of(gradients, 2)
            if norms.isfinite().all():
                return list(names), norms
        return list(names), norms_of(gradients, math.inf)

    def _restore(self, skip: Tensor) -> None:
        """Restore the model's buffers if ``skip`` is True."""
        for buffers, before in zip(self._buffers, self._before, strict=True):
            values = torch.where(skip, before, _joined(buffers))
            parts = values.split([buffer.numel() for buffer in buffers])
            shaped = [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
            copy_all(buffers, shaped)

    def report(self, step: Step, values: list[float]) -> None:
        """Log a skipped step, and write a report for reproducing it.

        All processes must call this method together.

        Args:
            step: The skipped step.
            values: The elements of ``step.values``, copied to the host.

        Raises:
            RunError: If more than ``max_skips`` steps have been skipped.
        """
        self._skipped += 1
        finite = zip(step.gradients, step.norms.isfinite().tolist(), strict=True)
        names = [name for name, good in finite if not good]
        problem = next(filter(None, comm.all_gather(_problem(step, values, names))), "")
        said = f"Iteration {step.iteration}: {problem}. The step was skipped."
        if self.output_dir:
            name = f"nonfinite_{step.iteration:07d}_rank{comm.get_rank()}.json"
            path = Path(self.output_dir, name)
            write_json(path, _report(problem, step, names))
            said += f" {path} lists its batch."
        if self._skipped > self.max_skips:
            raise RunError(
                f"{said} Resuming with --resume repeats the steps since the last checkpoint and "
                "fails in the same way. The usual cause is a learning rate that is too high for "
                "the batch size: reduce SOLVER.BASE_LR, use a longer warm-up, or set "
                "SOLVER.CLIP_GRADIENTS. To skip up to K such steps, set SOLVER.MAX_NONFINITE_STEPS "
                "to K."
            )
        logger.warning(
            "%s Steps skipped so far: %d of at most %d.", said, self._skipped, self.max_skips
        )


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _problem(step: Step, values: list[float], gradients: list[str]) -> str:
    """Return a description of this process's non-finite values, or "" if all are finite."""
    if step.problem:
        return step.problem
    _, checked, *losses = values
    named = zip(step.losses, losses, strict=True)
    bad = [f"{name} is {loss:g}" for name, loss in named if not math.isfinite(loss)]
    if not bad and gradients and checked:
        bad.append(
            f"{len(gradients)} gradients are not finite, such as the gradient of {gradients[0]}"
        )
    if bad and comm.get_world_size() > 1:
        bad.append(f"in process {comm.get_rank()}")
    return ", ".join(bad)


def _report(problem: str, step: Step, gradients: list[str]) -> dict[str, Any]:
    batch = step.batch
    if isinstance(batch, dict):
        batch = {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in batch.items()}
    return {
        "problem": problem,
        "iteration": step.iteration,
        "rank": comm.get_rank(),
        "processes": comm.get_world_size(),
        "torch_seed": step.seed,
        "nonfinite_gradients": gradients[:_LISTED],
        "batch": batch,
    }


def describe_batch(batch: Any) -> Any:
    """Return the fields that identify a batch's images.

    For a classifier, these are keys, indices and labels; for a detector, file names and ids.
    """
    if isinstance(batch, dict):
        return {key: value for key, value in batch.items() if key in ("key", "index", "label")}
    if isinstance(batch, list):
        return [{key: image.get(key) for key in ("file_name", "image_id")} for image in batch]
    return None
