"""Memory used in training: activations saved for the backward pass, and peak memory of a step."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def saved_bytes(function: Callable[[], object], model: nn.Module) -> int:
    """Return the number of bytes saved by autograd for a function's backward pass.

    Each storage is counted once with its full size, even if several operators save it or views of
    it. The model's input is counted, but its parameters and buffers are not.

    Args:
        function: The forward pass. It must keep a reference to its output, so that the graph is
            alive when it returns.
        model: The model, whose parameters and buffers are not counted.
    """
    own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    # Keep references so that no storage is freed, because its address could be reused.
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
    """Return the peak number of bytes allocated for tensors while a function runs.

    On a GPU, the peak is reported by the caching allocator. On a CPU, it is computed from the
    allocations and deallocations recorded by torch's profiler. Memory allocated before the call is
    not counted.
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
    """Return the maximum of the running sum of ``steps``, but at least 0."""
    total = highest = 0
    for step in steps:
        total += step
        highest = max(highest, total)
    return highest
