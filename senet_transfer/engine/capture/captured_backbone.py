"""Detector backbone that runs as CUDA graphs, with separate graphs for each image size."""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_line

logger = logging.getLogger(__name__)

Features: TypeAlias = dict[str, Tensor]
Forward: TypeAlias = Callable[[Tensor], Features]
# Function that captures a module with sample arguments, such as `make_graphed_callables`.
Capture: TypeAlias = Callable[[nn.Module, tuple[Tensor]], Forward]


class CapturedBackbone:
    """Forward pass of a backbone, captured as CUDA graphs for frequent image sizes.

    The images of a batch are padded to a common size. By default, a size is captured when it occurs
    for the third time. At most ``max_sizes`` sizes are captured, because each captured size needs
    memory for its feature maps and the gradients of the weights; all other sizes run eagerly.
    Evaluation is always eager.

    The results are the same as without capturing. In particular, the batch norm statistics, which
    change during a capture, are restored afterwards. The gradients returned by a backward pass are
    overwritten by the next backward pass, so gradients must not be accumulated over several passes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        capture: Capture | None = None,
        *,
        max_sizes: int = 8,
        occurrences: int = 3,
    ):
        """
        Args:
            backbone: The backbone, including its FPN, if any. Its ``forward`` is replaced.
            capture: A function that captures a module for sample inputs. If None, modules are
                captured as CUDA graphs that share one memory pool.
            max_sizes: The maximum number of image sizes to capture.
            occurrences: The number of times that an image size must occur to be captured. With 3,
                it is captured when it occurs for the third time.
        """
        self._backbone, self._forward = backbone, backbone.forward
        self._capture = capture or _capture_on_gpu(torch.cuda.graph_pool_handle())
        self._max_sizes, self._occurrences = max_sizes, occurrences
        self._modules = list(backbone.modules())
        self._captured: dict[Hashable, Forward] = {}
        self._seen: Counter[Hashable] = Counter()
        self._told = False
        backbone.forward = self

    def __call__(self, images: Tensor) -> Features:
        """Return the feature maps of padded and normalised images ``(N, 3, H, W)``.

        Raises:
            UserError: If the backbone can't be captured.
        """
        if not (self._backbone.training and torch.is_grad_enabled()):
            return self._forward(images)
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        modes = tuple(module.training for module in self._modules)
        key = (images.shape, images.stride(), images.dtype, dtype, modes)
        if key in self._captured:
            return self._captured[key](images)
        self._seen[key] += 1
        if self._seen[key] < self._occurrences:
            return self._forward(images)
        if len(self._captured) == self._max_sizes:
            if not self._told:
                self._told = True
                logger.info(
                    "CUDA graphs have been captured for the maximum of %d image sizes. Other sizes "
                    "run eagerly. To reduce the number of sizes, increase "
                    "INPUT.SIZE_DIVISIBILITY.",
                    self._max_sizes,
                )
            return self._forward(images)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            self._captured[key] = self._capture_size(images)
        return self._captured[key](images)

    def _capture_size(self, images: Tensor) -> Forward:
        buffers = [(buffer, buffer.clone()) for buffer in self._backbone.buffers()]
        try:
            captured = self._capture(_Forward(self._backbone, self._forward), (images.clone(),))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                "SOLVER.COMPILE is graph, but the backbone can't be captured as a CUDA graph "
                f"({first_line(error)}). Set SOLVER.COMPILE to none or default."
            ) from error
        for buffer, before in buffers:
            buffer.copy_(before)
        height, width = images.shape[2:]
        logger.info(
            "Captured the backbone as CUDA graphs for %d images of %dx%d pixels (height x width).",
            len(images),
            height,
            width,
        )
        return captured


class _Forward(nn.Module):
    """Module with the parameters and the original forward pass of a backbone."""

    def __init__(self, backbone: nn.Module, forward: Forward):
        super().__init__()
        self.backbone = backbone
        self._original = forward

    def forward(self, images: Tensor) -> Features:
        return self._original(images)


def _capture_on_gpu(pool: Any) -> Capture:
    # In the default mode, "global", data loader threads could not pin memory.
    options: dict[str, Any] = {"allow_unused_input": True, "pool": pool}
    if "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters:
        options["capture_error_mode"] = "thread_local"

    def capture(module: nn.Module, samples: tuple[Tensor]) -> Forward:
        return torch.cuda.make_graphed_callables(module, samples, **options)

    return capture
