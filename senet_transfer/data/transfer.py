"""Transfer of batches from the host to a GPU, using a side stream."""

from typing import Any, Protocol

import torch
from torch import Tensor


class SideStream(Protocol):
    """Protocol for streams whose copies overlap with the computation on the device."""

    def copy(self, tensor: Tensor) -> Tensor:
        """Start copying a tensor to the device, and return the copy."""

    def join(self, copies: list[Tensor]) -> None:
        """Make later computations on the device wait for all copies, without blocking the host."""


class CudaSideStream:
    """A CUDA stream for copies from pinned memory.

    The copy of a batch starts as soon as the host has loaded the batch. The GPU is usually still
    computing earlier steps at this time, so the copy and the computation overlap.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, tensor: Tensor) -> Tensor:
        """Start copying a tensor to the device, and return the copy.

        PyTorch keeps the source's pinned memory until the copy has finished.
        """
        with torch.cuda.stream(self.stream):
            return tensor.to(self.device, non_blocking=True)

    def join(self, copies: list[Tensor]) -> None:
        """Make the current stream wait for all copies, without blocking the host."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for copy in copies:
            # The side stream may reuse the memory of the copies only after the current stream has
            # used them.
            copy.record_stream(current)


class Transfer:
    """Callable that moves the tensors of a batch to a device.

    A batch is a dict of tensors and other values, or a list of such dicts. Tensors in pinned memory
    are copied asynchronously. Batches are not prefetched. A resumed run therefore uses the same
    batches as an uninterrupted run, and the error for an unreadable image is raised in the step
    that uses the image. On a CPU, the batch is returned unchanged.

    Args:
        device: Device of the model.
        stream: Stream for the copies; by default, a new CUDA stream if the device is a GPU.
    """

    def __init__(self, device: torch.device, stream: SideStream | None = None):
        self.device = device
        if stream is None and device.type == "cuda":
            stream = CudaSideStream(device)
        self.stream = stream

    def __call__(self, batch: Any) -> Any:
        """Return a batch whose tensors are on the device. The given batch is not modified."""
        if self.stream is None:
            return batch
        copies: list[Tensor] = []
        moved = self._moved(batch, copies)
        if copies:
            self.stream.join(copies)
        return moved

    def _moved(self, value: Any, copies: list[Tensor]) -> Any:
        assert self.stream is not None
        if isinstance(value, Tensor) and value.device.type == "cpu":
            copies.append(self.stream.copy(value))
            return copies[-1]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [self._moved(item, copies) for item in value]
        if isinstance(value, dict):
            return {key: self._moved(item, copies) for key, item in value.items()}
        return value
