"""Training step that is captured as a CUDA graph after a few eager steps."""

import logging
import random
from collections.abc import Callable, Hashable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from senet_transfer.data.cifar.transforms import to_device
from senet_transfer.engine.capture.graphs import Graph, Graphs, Outputs
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_line

logger = logging.getLogger(__name__)

Inputs: TypeAlias = dict[str, Tensor]

_REMEDY = "Set SOLVER.COMPILE to none or default."


class CapturedStep:
    """Training step that is captured as a graph and then replayed on the device.

    The first calls are eager. They are ordinary steps, and they also perform initialisation that is
    impossible during a capture, such as creating the optimizer's state and choosing convolution
    algorithms. A capture only records the step without computing it, so no state has to be restored
    afterwards. Eager and replayed steps compute the same values.

    Calls whose input shapes differ from the captured shapes, such as an incomplete batch, run
    eagerly. After ``warm_up`` consecutive calls with the same new shapes, the step is captured
    again, and the previous graph is discarded.
    """

    def __init__(
        self,
        function: Callable[[Inputs], Outputs],
        graphs: Graphs,
        *,
        state: Callable[[], Hashable] = lambda: None,
        warm_up: int = 3,
    ):
        """
        Args:
            function: The step function. It takes a dict of tensors on the device and returns
                tensors. It must not cause host-device synchronisation.
            graphs: The backend that captures the step, such as CUDA graphs.
            state: A function that returns all Python values that affect the step and may change
                between steps, such as the training modes of the modules. A graph is replayed only
                if these values are the same as during its capture.
            warm_up: The number of eager calls before a capture.
        """
        self._function, self._graphs, self._state = function, graphs, state
        self._warm_up = warm_up
        self._graph: Graph | None = None
        self._inputs: Inputs = {}
        self._captured: Hashable = None
        self._last: Hashable = None
        self._calls = 0
        self._told = False

    def __call__(self, inputs: Inputs) -> Outputs:
        """Run the step.

        Args:
            inputs: Tensors on any device. They are copied to the step's device asynchronously.

        Raises:
            UserError: If the step can't be captured.
        """
        key = (self._state(), *((name, x.shape, x.dtype) for name, x in inputs.items()))
        self._calls = self._calls + 1 if key == self._last else 1
        self._last = key
        if self._graph is None or key != self._captured:
            if self._calls <= self._warm_up:
                return self._eager(inputs)
            self._graph, self._inputs = None, {}  # Free the memory of an earlier graph first.
            device = self._graphs.device
            self._inputs = {
                k: torch.empty_like(value, device=device) for k, value in inputs.items()
            }
            self._fill(inputs)
            self._graph, self._captured = self._capture(), key
        else:
            self._fill(inputs)
        self._graph.replay()
        # The next replay overwrites the outputs.
        return tuple(output.clone() for output in self._graph.outputs)

    def _fill(self, inputs: Inputs) -> None:
        for name, buffer in self._inputs.items():
            buffer.copy_(_pinned(inputs[name], buffer), non_blocking=True)

    def _eager(self, inputs: Inputs) -> Outputs:
        if self._graph is not None and not self._told:
            self._told = True
            logger.info("Steps whose input shapes differ from the captured shapes run eagerly.")
        device = self._graphs.device
        inputs = {name: to_device(value, device) for name, value in inputs.items()}
        before = _random_state(device)
        outputs = self._graphs.warm_up(lambda: self._function(inputs))
        if _random_state(device) != before:
            raise UserError(
                "SOLVER.COMPILE is graph, but the training step draws random numbers on the host, "
                f"which a CUDA graph would repeat in every step. {_REMEDY}"
            )
        return outputs

    def _capture(self) -> Graph:
        try:
            graph = self._graphs.capture(lambda: self._function(self._inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                "SOLVER.COMPILE is graph, but the training step can't be captured as a CUDA "
                f"graph ({first_line(error)}). {_REMEDY}"
            ) from error
        logger.info("Captured the training step as a CUDA graph.")
        return graph


def _pinned(value: Tensor, target: Tensor) -> Tensor:
    """Copy a tensor to pinned memory if it is on the CPU and the target is on a GPU.

    Copies from pinned memory are asynchronous. Other tensors are returned unchanged.
    """
    on_host = value.device.type == "cpu" and target.device.type == "cuda"
    return value.pin_memory() if on_host else value


def _random_state(device: torch.device) -> Hashable:
    """Return the states of the CPU's random number generators.

    Replaying a CUDA graph does not advance these generators.
    """
    name, keys, *rest = np.random.get_state()
    own = b"" if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest), own
