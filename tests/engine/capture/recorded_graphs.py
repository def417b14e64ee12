"""Recording and replay of CPU operators, for tests of CUDA graphs without a GPU."""

import random

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

# Operators that read a value from the device, which CUDA does not allow during a capture.
READING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
}


class RecordedGraphs:
    """Stand-in for CUDA graphs that records the operators of a function on a CPU.

    As on a GPU, a capture leaves all tensors and random generators unchanged. A replay runs the
    recorded operators with the same tensors and scalars, and writes to the same outputs.

    Attributes:
        captures: Number of captures so far.
        replays: Number of replays so far.
    """

    device = torch.device("cpu")

    def __init__(self):
        self.captures = self.replays = 0

    def warm_up(self, function):
        return function()

    def capture(self, function):
        self.captures += 1
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
        with _Recorder() as recorder:
            outputs = function()
        recorder.restore()
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        return _RecordedGraph(self, recorder.calls, outputs)


class _RecordedGraph:
    def __init__(self, owner, calls, outputs):
        self._owner, self._calls, self.outputs = owner, calls, outputs

    @torch.no_grad()
    def replay(self):
        self._owner.replays += 1
        for function, args, kwargs, results in self._calls:
            found = tree_leaves(function(*args, **kwargs))
            for before, now in zip(results, found, strict=True):
                if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self._saved = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket in READING:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        # Batch norm changes the running statistics, although its schema does not declare it.
        if function._schema.is_mutable or "batch_norm" in function.overloadpacket.__name__:
            for tensor in tree_flatten((args, kwargs))[0]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self._saved.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, tree_leaves(result)))
        return result

    def restore(self):
        """Undo all changes made to tensors while operators were recorded."""
        for storage, before in self._saved.values():
            storage.copy_(before)
