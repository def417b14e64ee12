"""One step of training: any precision, on any device, with gradients of one or more parts."""

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
    """Detectron2's step, under autocast and in micro-batches where that is asked for.

    Detectron2's own AMPTrainer runs on CUDA alone.
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
            model: takes what the loader yields and returns a dict of losses.
            data_loader: an iterable without end, of lists or of dicts of equally long values.
            optimizer: steps the model's parameters.
            dtype: None for no autocast; "float16", "bfloat16", or empty: float16 on a GPU and
                bfloat16 on a CPU, which has no fast float16. Float16 scales the gradients.
            micro_batches: equal parts that a batch is cut into; the step is that of the mean of
                their losses.
            max_skips: as many steps with numbers that are not finite are left out.
            output_dir: takes what reproduces such a step; empty for none.

        Raises:
            UserError: another type, or no parts.
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
        """Replace the data loader by what a function returns."""
        super().reset_data_loader(data_loader_builder)
        self._batches = None

    def run_step(self) -> None:
        """One step of training, or none where a number in it is not finite on any process.

        Raises:
            UserError: data that can't be read, in any process.
            RunError: numbers are not finite, more often than is borne with.
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
        except (UserError, FloatingPointError) as error:  # Detectron2's RPN raises the second
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
        """The next batch, and the seconds that it took; an error in all processes, if in one."""
        start = time.perf_counter()
        batch = problem = None
        try:
            if self._batches is None:
                self._batches = iter(self.data_loader)
            batch = next(self._batches)
        except UserError as error:
            problem = error
        seconds = time.perf_counter() - start
        # The forward pass may exchange buffers, which a process without a batch would not join.
        self.guard.agree(problem)
        return batch, seconds

    def _loss(self, part: Any, totals: dict[str, torch.Tensor]) -> torch.Tensor:
        """The share of a part in the loss of the batch; adds its terms to the totals."""
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
            losses = self.model(part)
        losses = {name: loss / self.micro_batches for name, loss in losses.items()}
        for name, loss in losses.items():
            totals[name] = totals[name] + loss.detach()
        return sum(losses.values())

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager:
        # Processes exchange gradients once a step, with those of the last part.
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict:
        """State of the optimizer and of the scaler, if any; how many steps were left out."""
        own = {"grad_scaler": self.grad_scaler.state_dict(), "skipped": self.guard.skipped}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes back what :meth:`state_dict` gave.

        Raises:
            UserError: the parameters were grouped otherwise.
        """
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise UserError(
                f"The checkpoint's optimizer does not fit this run's ({error}). Set the rates and "
                "decays of SOLVER to what the run began with, or start a new one with "
                "MODEL.WEIGHTS."
            ) from error
        self.guard.skipped = state_dict.get("skipped", 0)
        # Empty or absent where the run was begun without a scaler.
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cuts a batch, a list or a dict of equally long values, into equal parts.

    Raises:
        UserError: it can't be cut evenly.
    """
    if parts == 1:
        return [batch]
    size = len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)
    if size % parts:
        raise UserError(
            f"SOLVER.MICRO_BATCHES is {parts}, and a process has {size} images a step, which can't "
            "be cut into that many equal parts. Set it to a divisor."
        )
    step = size // parts
    cuts = [slice(first, first + step) for first in range(0, size, step)]
    if isinstance(batch, dict):
        return [{key: value[cut] for key, value in batch.items()} for cut in cuts]
    return [batch[cut] for cut in cuts]
