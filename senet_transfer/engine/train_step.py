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
            model: The model, which takes a batch and returns a dict of losses.
            data_loader: An infinite iterable of batches. A batch is a list, or a dict of values of
                equal length.
            optimizer: The optimizer of the model's parameters.
            dtype: The type of autocast, "float16" or "bfloat16", or None to disable it. If empty,
                it is float16 on a GPU and bfloat16 on a CPU, which has no fast float16. Gradients
                are scaled with float16.
            micro_batches: The number of equal parts that a batch is split into. Their gradients
                are accumulated to those of the mean loss.
            max_skips: The number of steps with non-finite values that may be skipped before the
                run is ended.
            output_dir: The folder for reports about skipped steps, or empty to write none.

        Raises:
            UserError: If ``dtype`` or ``micro_batches`` is invalid.
        """
        super().__init__(model, data_loader, optimizer)
        self._batches: Iterator[Any] | None = None
        self.device_type = next(model.parameters()).device.type
        if dtype == "":
            dtype = "float16" if self.device_type == "cuda" else "bfloat16"
        if dtype is not None and dtype not in _DTYPES:
            raise UserError(f"SOLVER.AMP.DTYPE is {dtype!r}, expected float16 or bfloat16.")
        if micro_batches < 1:
            raise UserError(f"SOLVER.MICRO_BATCHES is {micro_batches}, expected 1 or more.")
        self.dtype = None if dtype is None else _DTYPES[dtype]
        self.micro_batches = micro_batches
        self.guard = StepGuard(model, max_skips=max_skips, output_dir=output_dir)
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=self.dtype == torch.float16
        )

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Replace the data loader by the one that ``data_loader_builder`` returns."""
        super().reset_data_loader(data_loader_builder)
        self._batches = None

    def run_step(self) -> None:
        """Run a training step, but skip the update if a value is non-finite in any process.

        Raises:
            UserError: If data can't be read in any process.
            RunError: If more steps than allowed had non-finite values.
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
        except (UserError, FloatingPointError) as error:  # the latter from Detectron2's RPN
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
        # The forward pass may contain collective operations, which would hang if one process had no
        # batch.
        self.guard.agree(problem)
        return batch, seconds

    def _loss(self, part: Any, totals: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a micro-batch's contribution to the total loss, and add its losses to totals."""
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
            losses = self.model(part)
        losses = {name: loss / self.micro_batches for name, loss in losses.items()}
        for name, loss in losses.items():
            totals[name] = totals[name] + loss.detach()
        return sum(losses.values())

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager:
        # Gradients are reduced across processes once per step, with the last micro-batch.
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict:
        """Return the state of the optimizer and the gradient scaler, and the skipped steps."""
        own = {"grad_scaler": self.grad_scaler.state_dict(), "skipped": self.guard.skipped}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the state of a checkpoint.

        Raises:
            UserError: If the optimizer's parameter groups differ from those of the checkpoint.
        """
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise UserError(
                f"The checkpoint's optimizer does not fit this run's ({error}). Set the learning "
                "rates and weight decays of SOLVER to their values at the start of the run, or "
                "start a new run with MODEL.WEIGHTS."
            ) from error
        self.guard.skipped = state_dict.get("skipped", 0)
        # The state is empty or absent if the run was started without a scaler.
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split a batch, which is a list or a dict of values of equal length, into equal parts.

    Raises:
        UserError: If the batch can't be divided evenly.
    """
    if parts == 1:
        return [batch]
    size = len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)
    if size % parts:
        raise UserError(
            f"SOLVER.MICRO_BATCHES is {parts}, but the {size} images per process and step can't be "
            f"divided into that many equal parts. Set it to a divisor of {size}."
        )
    step = size // parts
    cuts = [slice(first, first + step) for first in range(0, size, step)]
    if isinstance(batch, dict):
        return [{key: value[cut] for key, value in batch.items()} for cut in cuts]
    return [batch[cut] for cut in cuts]
