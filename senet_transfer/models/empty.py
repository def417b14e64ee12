"""Models built without memory for their weights, to be counted or examined."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def built_empty() -> Iterator[None]:
    """Builds what is built inside without memory, which takes no time; see `fill_empty`."""
    with torch.device("meta"):
        yield


def fill_empty(model: nn.Module) -> nn.Module:
    """Gives a model that was built empty its place on the CPU, with zeros everywhere."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model
