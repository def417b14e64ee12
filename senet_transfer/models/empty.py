"""Models without allocated weights, for counting parameters or inspecting shapes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def built_empty() -> Iterator[None]:
    """Create all modules in this context on the meta device, without allocating their weights."""
    with torch.device("meta"):
        yield


def fill_empty(model: nn.Module) -> nn.Module:
    """Allocate the weights of a :func:`built_empty` model on the CPU and fill them with zeros."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model
