"""Functions that inject failures into a run's process before its script starts."""

import ctypes
import os
import resource
import signal
import time

from detectron2.utils import comm

from senet_transfer.engine.train_step import StepTrainer
from senet_transfer.errors import UserError

_CALLS = ("fsync", "replace", "unlink", "truncate")


def die_at_call(count: int) -> None:
    """Kill the process at its ``count``-th call to any of fsync, replace, unlink and truncate."""
    left = [count]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))


def die_at_byte(count: int) -> None:
    """Limit the size of files in bytes, so that a write beyond the limit kills the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def full_at_byte(count: int) -> None:
    """Make writes beyond the given number of bytes per file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def obey_permissions() -> None:
    """Drop root's capabilities, so that writes to read-only folders fail."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def slow_steps() -> None:
    """Make each training step take a minute longer."""
    step = StepTrainer.run_step

    def slow(self):
        step(self)
        time.sleep(60)

    StepTrainer.run_step = slow


def poison(iterations: tuple[int, ...], rank: int) -> None:
    """Make the loss NaN in the given iterations of one rank."""
    loss = StepTrainer._loss

    def poisoned(self, part, totals):
        value = loss(self, part, totals)
        if self.iter in iterations and comm.get_rank() == rank:
            totals["loss_cls"] = totals["loss_cls"] * float("nan")
            value = value * float("nan")
        return value

    StepTrainer._loss = poisoned


def no_batch(iteration: int, rank: int) -> None:
    """Make the data loader raise a UserError in the given iteration of one rank."""
    next_batch = StepTrainer._next_batch

    def broken():
        raise UserError("the image x.jpg is broken")
        yield

    def unreadable(self):
        if (self.iter, comm.get_rank()) == (iteration, rank):
            self._batches = broken()
        return next_batch(self)

    StepTrainer._next_batch = unreadable


def raise_in_the_model(iterations: tuple[int, ...], rank: int) -> None:
    """Raise Detectron2's error about NaN predictions in the given iterations of one rank."""
    loss = StepTrainer._loss

    def raising(self, part, totals):
        value = loss(self, part, totals)
        if self.iter in iterations and comm.get_rank() == rank:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN")
        return value

    StepTrainer._loss = raising
