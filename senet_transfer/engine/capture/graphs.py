"""Capture of functions as CUDA graphs.

A CUDA graph is a recording of kernels. Replaying it launches all of them at once, on the same
memory as during the capture. All values computed by the host during the capture, such as numbers
and the choice of branches, are the same in every replay. Random numbers are the exception: PyTorch
passes the current seed of the device's default generator to each replay.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Function = Callable[[], Outputs]


class Graph(Protocol):
    """Captured function.

    Attributes:
        outputs: The function's results, which each replay overwrites.
    """

    outputs: Outputs

    def replay(self) -> None:
        """Compute the outputs from the current values of the tensors that the function reads."""


class Graphs(Protocol):
    """Source of graphs: a GPU, or a test's recording of operators."""

    device: torch.device

    def warm_up(self, function: Function) -> Outputs:
        """Call a function under the same conditions as during a capture, and return its results."""

    def capture(self, function: Function) -> Graph:
        """Capture a function without computing anything."""


class CudaGraphs:
    """CUDA graphs of a device. Each has its own memory, which is freed with the graph.

    Attributes:
        device: The device.
    """

    def __init__(self, device: torch.device):
        """
        Args:
            device: A CUDA device.
        """
        self.device = device
        # The default stream can't be captured. Functions are warmed up on the same stream as they
        # are captured on, because libraries allocate their workspaces per stream.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Function) -> Outputs:
        """Call a function on the stream on which functions are captured."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function()
        current.wait_stream(self._stream)
        return outputs

    def capture(self, function: Function) -> Graph:
        """Capture a function as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # With the default mode, "global", the threads of data loaders could not pin memory.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            outputs = function()
        return _CudaGraph(graph, outputs)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Outputs):
        self.outputs = outputs
        self.replay = graph.replay
