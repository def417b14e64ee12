"""Training step with mixed precision and gradient accumulation, on CPU and GPU.

On a GPU, a step reads no values from the device, to avoid host-device synchronisation. Instead, the
losses of several steps are read together.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from senet_transfer.data.transfer import Transfer
from senet_transfer.engine.capture.captured_step import CapturedStep
from senet_transfer.engine.capture.graphs import Graphs
from senet_transfer.engine.hooks import ModelEMA
from senet_transfer.engine.nonfinite_guard import Step, StepGuard, describe_batch
from senet_transfer.engine.solver import tensor_rates
from senet_transfer.errors import UserError
from senet_transfer.utils.private_api import scaler_state, skips_on_device

# Name of the captured step's input with the learning rates and the weight of the average.
_NUMBERS = "numbers"

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class StepTrainer(SimpleTrainer):
    """SimpleTrainer with optional mixed precision and gradient accumulation.

    Unlike Detectron2's AMPTrainer, it also runs on a CPU.

    Attributes:
        waited: The total time spent waiting for batches, in seconds.
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
        reads_after: Callable[[int], bool] | None = None,
        graphs: Graphs | None = None,
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
            micro_batches: The number of micro-batches of equal size that each batch is split into.
                The accumulated gradient is the gradient of the mean loss of the batch.
            max_skips: The number of steps with non-finite values that may be skipped. If there are
                more, the run ends with an error.
            output_dir: The folder for reports about skipped steps. If empty, no reports are
                written.
            reads_after: A function that returns whether losses are read from the device, logged and
                checked after the given iteration. If None, they are read after each iteration. The
                function is ignored if the optimizer is not fused, because only a fused optimizer
                can skip a step on the device.
            graphs: The backend that captures the step as a graph, or None to run the step eagerly.
                A graph contains the whole step, including the optimizer and the update of the
                weight average. If the data loader augments batches on the device, the graph also
                contains the augmentation. Capturing requires batches that are dicts, and losses
                that are not read after each iteration.

        Raises:
            UserError: If ``dtype`` or ``micro_batches`` is invalid, or if the step can't be
                captured.
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
        self._reads_after = reads_after if skips_on_device(optimizer) else None
        self.guard = StepGuard(
            model,
            max_skips=max_skips,
            output_dir=output_dir,
            deferred=self._reads_after is not None,
        )
        self._unread: list[Step] = []
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=self.dtype == torch.float16
        )
        self._average: ModelEMA | None = None
        self._captured: CapturedStep | None = None
        if graphs is not None:
            if self._reads_after is None:
                raise UserError(
                    "SOLVER.COMPILE is graph, but this optimizer can't skip steps on the device; "
                    "expected fused SGD or AdamW. Set SOLVER.COMPILE to none or default."
                )
            modules = list(model.modules())
            self._captured = CapturedStep(
                self._step_on_device, graphs, state=lambda: tuple(m.training for m in modules)
            )
        self._names: tuple[list[str], list[str]] = [], []
        device = next(model.parameters()).device
        self._one = torch.ones((), device=device)
        self._transfer = Transfer(device)
        self.waited = 0.0

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Replace the data loader with the one returned by ``data_loader_builder``."""
        super().reset_data_loader(data_loader_builder)
        self._batches = None

    def run_step(self) -> None:
        """Run one training step; skip the update if a loss or gradient of any rank is not finite.

        Raises:
            UserError: If any process can't read its data.
            RunError: If more than ``max_skips`` steps had non-finite values.
        """
        batch, data_time = self._next_batch()
        step = Step(self.iter, data_time, describe_batch(batch), torch.initial_seed())
        if self._captured is None:
            self._compute(step, self._transfer(batch))
        else:
            numbers = [group["lr"] for group in self.optimizer.param_groups]
            if self._average:
                numbers.append(self._average.next_weight())
            tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
            step.values, step.norms = self._captured({**tensors, _NUMBERS: torch.tensor(numbers)})
            step.losses, step.gradients = self._names
        self._unread.append(step)
        if self._reads_after is None or self._reads_after(self.iter) or self.guard.stops:
            self.read()

    def use_average(self, average: ModelEMA) -> None:
        """Include the update of a moving average of the weights in the CUDA graph of the step.

        Without CUDA graphs, this method does nothing, because ``average`` is also a hook, which
        then updates the moving average after each step.
        """
        if self._captured is not None:
            self._average = average
            average.in_step = True

    def _step_on_device(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run a step without reading from the device, so that a CUDA graph can capture it.

        Args:
            inputs: The tensors of the batch, and a tensor with the learning rate of each parameter
                group. If the weights are averaged, the last element of this tensor is the weight of
                the current model in the average. If the data loader builds batches on the device,
                ``inputs`` contains image indices and random numbers instead of the batch.

        Returns:
            The step's values and gradient norms; see :class:`Step`.
        """
        numbers = inputs[_NUMBERS].unbind()
        batch = {key: value for key, value in inputs.items() if key != _NUMBERS}
        if getattr(self.data_loader, "planned", False):
            batch = self.data_loader.assemble(batch)
        step = Step(self.iter, 0.0, None, 0)
        with tensor_rates(self.optimizer, numbers[: len(self.optimizer.param_groups)]):
            self._compute(step, batch)
        if step.problem:
            raise FloatingPointError(step.problem)
        if self._average:
            self._average.update(numbers[-1])
        self._names = step.losses, step.gradients
        return step.values, step.norms

    def _compute(self, step: Step, batch: Any) -> None:
        """Compute losses and gradients, update the parameters, and store results in ``step``."""
        self.optimizer.zero_grad()
        self.guard.remember()
        totals: dict[str, torch.Tensor] = defaultdict(float)
        *parts, last = split_batch(batch, self.micro_batches)
        raised: Exception | None = None
        try:
            for part in parts:
                with self._gradients_stay_here():
                    self.grad_scaler.scale(self._loss(part, totals)).backward()
            loss = self._loss(last, totals)
        except (UserError, FloatingPointError) as error:  # Detectron2's RPN raises the latter.
            raised = error
        step.problem = self.guard.agree(raised)
        if not step.problem:
            self.grad_scaler.scale(loss).backward()
            self.after_backward()
        skip, overflow = self.guard.check(step, totals, self.grad_scaler.scale(self._one))
        if not step.problem:
            self._update(skip, overflow)

    def _update(self, skip: torch.Tensor, overflow: torch.Tensor) -> None:
        """Update the parameters and the gradient scale unless ``skip`` is True."""
        if not self.guard.deferred:
            if not skip:
                self.grad_scaler.step(self.optimizer)
                self.grad_scaler.update()
            return
        state = scaler_state(self.grad_scaler)
        before = [tensor.clone() for tensor in state]
        self.grad_scaler.unscale_(self.optimizer)
        # A fused optimizer leaves parameters and state unchanged if this attribute is 1.
        self.optimizer.found_inf = (skip | overflow).float()
        self.optimizer.step()
        self.grad_scaler.update()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(torch.where(skip, value, tensor))

    def read(self) -> None:
        """Read the losses of all steps since the last call, log them, and report skipped steps.

        All processes must call this method together.

        Raises:
            RunError: If more than ``max_skips`` steps had non-finite values.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return
        values = torch.cat([step.values for step in steps]).cpu()
        rows = [row.tolist() for row in values.split([len(step.values) for step in steps])]
        metrics = [
            (step.data_time, {} if row[0] else dict(zip(step.losses, row[2:], strict=True)))
            for step, row in zip(steps, rows, strict=True)
        ]
        # One collective operation for all steps; only the main process receives the metrics.
        ranks = comm.gather(metrics)
        for index, (step, row) in enumerate(zip(steps, rows, strict=True)):
            if row[0]:
                self.guard.report(step, row)
            else:
                _log(step, [rank[index] for rank in ranks])

    def _next_batch(self) -> tuple[Any, float]:
        """Return the next batch and the time spent waiting for it, in seconds.

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
        self.waited += seconds
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
            super().load_state_dict({**state_dict, "optimizer": self._implemented(state_dict)})
        except ValueError as error:
            raise UserError(
                "The optimizer state in the checkpoint does not match this run's optimizer "
                f"({error}). The parameter groups depend on the learning rate factors and weight "
                "decays in SOLVER, and on the frozen stages (MODEL.BACKBONE.FREEZE_AT). Set these "
                "keys to the values with which the run was started, or start a new run with "
                "MODEL.WEIGHTS."
            ) from error
        self.guard.skipped = state_dict.get("skipped", 0)
        # The state is empty or missing if the run was started without a scaler.
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)

    def _implemented(self, state_dict: dict) -> dict:
        """Adapt a checkpoint's optimizer state to this optimizer's implementation, fused or not.

        Otherwise, a checkpoint from a CPU would turn off the fused implementation on a GPU.
        """
        own = self.optimizer.param_groups[0]
        options = {key: own[key] for key in ("foreach", "fused") if key in own}
        saved = state_dict["optimizer"]
        return {**saved, "param_groups": [{**group, **options} for group in saved["param_groups"]]}


def _log(step: Step, ranks: list[tuple[float, dict[str, float]]]) -> None:
    """Log the metrics of a step, as Detectron2's ``SimpleTrainer.write_metrics`` does.

    Args:
        step: The step.
        ranks: In the main process, the data times and losses of all processes; otherwise empty.
    """
    storage, iteration = get_event_storage(), step.iteration
    storage.put_scalar("rank_data_time", step.data_time, cur_iter=iteration)
    if not ranks:
        return
    times, losses = zip(*ranks, strict=True)
    means = {name: np.mean([own[name] for own in losses]) for name in losses[0]}
    storage.put_scalar("data_time", max(times), cur_iter=iteration)
    storage.put_scalar("total_loss", sum(means.values()), cur_iter=iteration)
    if len(means) > 1:
        storage.put_scalars(cur_iter=iteration, **means)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split a batch into micro-batches of equal size.

    Args:
        batch: A list of samples, or a dict of tensors and lists with one entry per sample.
        parts: The number of micro-batches.

    Raises:
        UserError: If the batch size is not divisible by ``parts``.
    """
    if parts == 1:
        return [batch]
    size = len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)
    if size % parts:
        raise UserError(
            f"SOLVER.MICRO_BATCHES is {parts}, but the batch of {size} images per process can't be "
            "split into that many micro-batches of equal size. Set SOLVER.MICRO_BATCHES to a "
            f"divisor of {size}."
        )
    step = size // parts
    cuts = [slice(first, first + step) for first in range(0, size, step)]
    if isinstance(batch, dict):
        return [{key: value[cut] for key, value in batch.items()} for cut in cuts]
    return [batch[cut] for cut in cuts]
