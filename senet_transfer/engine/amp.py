"""Mixed precision on any device."""

import time

import torch
from detectron2.engine import SimpleTrainer
from torch.nn import Module
from torch.optim import Optimizer

from senet_transfer.errors import UserError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AutocastTrainer(SimpleTrainer):
    """Detectron2's step under autocast, with a gradient scaler where the type is float16.

    Detectron2's own AMPTrainer runs on CUDA alone.
    """

    def __init__(self, model: Module, data_loader, optimizer: Optimizer, *, dtype: str = ""):
        """
        Args:
            model: takes what the loader yields and returns a dict of losses.
            data_loader: an iterable without end.
            optimizer: steps the model's parameters.
            dtype: "float16", "bfloat16", or empty: float16 on a GPU and bfloat16 on a CPU, which
                has no fast float16.

        Raises:
            UserError: another type.
        """
        super().__init__(model, data_loader, optimizer)
        self.device_type = next(model.parameters()).device.type
        dtype = dtype or ("float16" if self.device_type == "cuda" else "bfloat16")
        if dtype not in _DTYPES:
            raise UserError(f"SOLVER.AMP.DTYPE is {dtype!r}, expected float16 or bfloat16.")
        self.dtype = _DTYPES[dtype]
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=self.dtype == torch.float16
        )

    def run_step(self) -> None:
        """One step of training."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with torch.autocast(self.device_type, dtype=self.dtype):
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        """The optimizer's state and the scaler's."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        # Absent or empty where the run was begun without a scaler.
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)
