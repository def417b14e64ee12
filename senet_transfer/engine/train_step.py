"""Training step with mixed precision and gradient accumulation, on CPU and GPU."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from senet_transfer.engine.nonfinite_guard import StepGuard
from senet_transfer.errors import UserError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class StepTrainer(SimpleTrainer):
    """SimpleTrainer with optional mixed precision and gradient accumulation.

    Unlike Detectron2's AMPTrainer, it also runs on a CPU.
    """

    def __init__(
        self,
        model: Module,
        data_loader: Iterable[Any],
        optimizer: Optimizer,
        *,
        dtype: str | None = None,
        micro_batches: int = 1,
        max_skips: int = 0,
        output_dir: str = "",
    ):
        """
        Args:
            model: The model. It takes a batch and returns a dict of losses.
            data_loader: An infinite iterable of batches. A batch is a list, or a dict of values of
                equal length.
            optimizer: The optimizer for the model's parameters.
            dtype: The autocast dtype, "float16" or "bfloat16", or None to disable autocast. An
                empty string selects float16 on a GPU and bfloat16 on a CPU, where float16 is slow.
                With float16, the loss is scaled.
            micro_batches: The number of equal parts into which each batch is split. Their
                gradients are accumulated, which gives the gradient of the mean loss.
            max_skips: The number of steps with non-finite values to skip before ending the run
                with an error.
            output_dir: The folder for reports about skipped steps. If empty, no reports are
                written.

        Raises:
            UserError: If ``dtype`` or ``micro_batches`` is invalid.
        """
        super().__init__(model, data_loader, optimizer)
        self._batches: Iterator[Any] | None = None
        self.device_type = next(model.parameters()).device.type
        if dtype == "":
            dtype = "float16" if self.device_type == "cuda" else "bfloat16"
        if dtype is not None and dtype not in _DTYPES:
            raise UserError(f"SOLVER.AMP.DTYPE is {dtype!r}; expected float16 or bfloat16.")
        if micro_batches < 1:
            raise UserError(f"SOLVER.MICRO_BATCHES is {micro_batches}; expected 1 or more.")
        self.dtype = None if dtype is None else _DTYPES[dtype]
        self.micro_batches = micro_batches
        self.guard = StepGuard(model, max_skips=max_skips, output_dir=output_dir)
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=self.dtype == torch.float16
        )

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Replace the data loader with the one returned by ``data_loader_builder``."""
        super().reset_data_loader(data_loader_builder)
        self._batches = None

    def run_step(self) -> None:
        """Run one training step; skip the update if any process has a non-finite value.

        Raises:
            UserError: If any process can't read its data.
            RunError: If more than ``max_skips`` steps had non-finite values.
        """
        self.optimizer.zero_grad()
        self.guard.remember()
        totals: dict[str, torch.Tensor] = defaultdict(float)
        batch, data_time = self._next_batch()
        *parts, last = split_batch(batch, self.micro_batches)
        raised: Exception | None = None
        try:
            for part in parts:
                with self._gradients_stay_here():
                    self.grad_scaler.scale(self._loss(part, totals)).backward()
            loss = self._loss(last, totals)
        except (UserError, FloatingPointError) as error:  # Detectron2's RPN raises the latter.
            raised = error
        problem = self.guard.agree(raised)
        if not problem:
            self.grad_scaler.scale(loss).backward()
            self.after_backward()
            problem = self.guard.check(totals, self.grad_scaler.get_scale())
        if problem:
            self.guard.refuse(problem, self.iter, batch)
            return
        self.write_metrics(totals, data_time, self.iter)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _next_batch(self) -> tuple[Any, float]:
        """Return the next batch and the seconds spent waiting for it.

        If one process fails to read its batch, all processes raise an error.
        """
        start = time.perf_counter()
        batch = problem = None
        try:
            if self._batches is None:
                self._batches = iter(self.data_loader)
            batch = next(self._batches)
        except UserError as error:
            problem = error
        seconds = time.perf_counter() - start
        # The forward pass may contain collective operations, which would hang if any process had no
        # batch.
        self.guard.agree(problem)
        return batch, seconds

    def _loss(self, part: Any, totals: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a micro-batch's share of the total loss, and add its losses to ``totals``."""
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
            losses = self.model(part)
        losses = {name: loss / self.micro_batches for name, loss in losses.items()}
        for name, loss in losses.items():
            totals[name] = totals[name] + loss.detach()
        return sum(losses.values())

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager:
        # Gradients are reduced across processes once per step, during the last micro-batch.
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict:
        """Return the optimizer and gradient scaler states and the number of skipped steps."""
        own = {"grad_scaler": self.grad_scaler.state_dict(), "skipped": self.guard.skipped}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the state from a checkpoint.

        Raises:
            UserError: If the optimizer's parameter groups differ from those in the checkpoint.
        """
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise UserError(
                "The optimizer state in the checkpoint does not match this run's optimizer "
                f"({error}). Set the learning rates and weight decays in SOLVER to the values with "
                "which the run was started, or start a new run with MODEL.WEIGHTS."
            ) from error
        self.guard.skipped = state_dict.get("skipped", 0)
        # The state is empty or missing if the run was started without a scaler.
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split a batch, either a list or a dict of values of equal length, into equal parts.

    Raises:
        UserError: If the batch size is not divisible by ``parts``.
    """
    if parts == 1:
        return [batch]
    size = len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)
    if size % parts:
        raise UserError(
            f"SOLVER.MICRO_BATCHES is {parts}, but the batch of {size} images per process can't be "
            f"split into that many equal parts. Set SOLVER.MICRO_BATCHES to a divisor of {size}."
        )
    step = size // parts
    cuts = [slice(first, first + step) for first in range(0, size, step)]
    if isinstance(batch, dict):
        return [{key: value[cut] for key, value in batch.items()} for cut in cuts]
    return [batch[cut] for cut in cuts]
