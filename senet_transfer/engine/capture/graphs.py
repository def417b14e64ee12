"""Capture of functions as CUDA graphs.

A CUDA graph is a recording of kernels. A replay launches all of these kernels at once and uses the
same memory as the capture. Everything that the host computed during the capture, such as numbers
and branch decisions, is the same in every replay. Random numbers are the exception: PyTorch passes
the current seed of the device's default generator to each replay.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Function = Callable[[], Outputs]


class Graph(Protocol):
    """Function that was captured as a graph.

    Attributes:
        outputs: The function's results, which each replay overwrites.
    """

    outputs: Outputs

    def replay(self) -> None:
        """Execute the captured operations on the current input values; overwrite ``outputs``."""


class Graphs(Protocol):
    """Interface for capturing functions as CUDA graphs. Tests use an implementation for the CPU."""

    device: torch.device

    def warm_up(self, function: Function) -> Outputs:
        """Call a function under the same conditions as during a capture, and return its results."""

    def capture(self, function: Function) -> Graph:
        """Record a function's operations as a graph, without executing them."""


class CudaGraphs:
    """Capture of functions as CUDA graphs. Each graph owns the memory that it uses.

    Attributes:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device):
        """
        Args:
            device: A CUDA device.
        """
        self.device = device
        # The default stream can't be captured. Functions are warmed up on the stream that is used
        # for captures, because libraries allocate their workspaces per stream.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Function) -> Outputs:
        """Call a function on the stream that is used for captures, and return its results.

        This call must precede the capture, because libraries allocate workspaces on the first call.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function()
        current.wait_stream(self._stream)
        return outputs

    def capture(self, function: Function) -> Graph:
        """Capture a function as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # In the default mode, "global", data loader threads could not pin memory.
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
