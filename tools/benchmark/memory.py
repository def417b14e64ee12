"""What training keeps: the activations that autograd saves, and the peak of a whole step."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def saved_bytes(function: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a function.

    Each storage counts once, whole, however many operators keep it or parts of it. Parameters and
    buffers don't count; the input of the model does.

    Args:
        function: the forward pass, on a graph that is still held when it returns.
        model: whose parameters and buffers are left out.
    """
    own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    # Held, so that no storage is freed and its address given to another.
    held = []

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own:
            storages[_key(tensor)] = tensor.untyped_storage().nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The highest number of bytes that tensors occupied at once while a function ran.

    On a GPU this is the allocator's own count. On a CPU it is the sum over torch's allocations
    and releases as its profiler records them, over what was there at the start.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return highest_sum(_allocations(profile))


def _allocations(profile: torch.profiler.profile) -> Iterable[int]:
    events = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def highest_sum(steps: Iterable[int]) -> int:
    """The highest partial sum of positive and negative steps, or 0."""
    total = highest = 0
    for step in steps:
        total += step
        highest = max(highest, total)
    return highest
