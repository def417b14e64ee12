"""Parameter, multiply-accumulate and activation counts of a model and of its SE gates.

The counting rules reproduce the SENet paper's numbers. Multiply-accumulates (MACs) are counted for
convolutions, linear layers and matrix products. For SE gates, one MAC per element is added for
global pooling and one for the multiplication with the feature map. fvcore doesn't count these MACs,
but they explain why the paper reports 3.86 GFLOPs for ResNet-50 and 3.87 GFLOPs for SE-ResNet-50.
Norms are not counted because they can be folded into the preceding convolution. Other pooling,
additions, scaling and non-linearities are not counted either.
"""

from collections import Counter
from dataclasses import astuple, dataclass, replace
from math import prod
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis, jit_handles
from fvcore.nn.jit_handles import Handle, get_shape
from torch import Tensor, nn

from senet_transfer.analysis.se_layers import is_se_layer

# Convolutions and matrix products, and the fvcore functions that count their MACs.
_PRODUCTS: dict[str, Handle] = {
    "_convolution": jit_handles.conv_flop_jit,
    "linear": jit_handles.linear_flop_jit,
    "addmm": jit_handles.addmm_flop_jit,
    "mm": jit_handles.matmul_flop_jit,
    "bmm": jit_handles.bmm_flop_jit,
    "matmul": jit_handles.matmul_flop_jit,
    "einsum": jit_handles.einsum_flop_jit,
}

# Other operators in gates, and whether to count the elements of their input or output.
_GATE = {"mean": "in", "amax": "in", "mul": "out", "addcmul": "out"}

# Operators without cost under these rules, in addition to those that fvcore ignores by default.
_FREE = (
    "adaptive_avg_pool2d", "add", "add_", "avg_pool2d", "batch_norm", "channel_shuffle", "clone",
    "div", "gelu", "group_norm", "hardsigmoid", "hardswish", "hardswish_", "layer_norm", "lerp",
    "max_pool2d", "meshgrid", "mul_", "pad", "reciprocal", "rsqrt", "rsub", "sigmoid", "sigmoid_",
    "silu", "silu_", "softmax", "sub", "tanh", "unflatten", "upsample_nearest2d",
)  # fmt: skip

_ACTIVATIONS, _GATE_WORK = "activations", "gate"


@dataclass(frozen=True)
class Cost:
    """Parameter count and computational cost of a module in one forward pass.

    Attributes:
        parameters: Number of weights and biases, including frozen ones but not the running
            statistics of norms.
        macs: Number of multiply-accumulates.
        activations: Number of output elements of convolutions and linear layers.
        se_parameters: Number of parameters in SE gates.
        se_macs: Number of multiply-accumulates in SE gates.
    """

    parameters: int = 0
    macs: int = 0
    activations: int = 0
    se_parameters: int = 0
    se_macs: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def repeated(self, times: int) -> "Cost":
        """Return the cost of running the module ``times`` times with the same weights."""
        return replace(
            self,
            macs=times * self.macs,
            activations=times * self.activations,
            se_macs=times * self.se_macs,
        )


@dataclass(frozen=True)
class Measured:
    """Parameter counts and computational costs of all modules in a forward pass.

    Attributes:
        modules: Cost of each module including its submodules, by name. ``""`` is the whole model.
        unknown: Operators whose cost is unknown and not counted, with the number of calls to each.
    """

    modules: dict[str, Cost]
    unknown: dict[str, int]

    @property
    def total(self) -> Cost:
        """Cost of the whole model."""
        return self.modules[""]


def measure(model: nn.Module, *inputs: Tensor) -> Measured:
    """Count parameters, MACs and activations of one forward pass in evaluation mode.

    Args:
        model: Any module. Its SE layers, as defined in :mod:`~.se_layers`, are also counted
            separately.
        inputs: Inputs to the forward pass. The counts are for the whole batch.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    analysis = _analysis(model, inputs)
    with torch.no_grad():
        counts = analysis.by_module_and_operator()
    for module, training in modes.items():
        module.training = training
    gates = {name for name, m in model.named_modules() if is_se_layer(m)}
    gate_macs = {name: _products(counts[name]) + counts[name][_GATE_WORK] for name in gates}
    modules = {}
    for name, module in model.named_modules():
        inside = [gate for gate in gates if not name or f"{gate}.".startswith(f"{name}.")]
        outside_layers = sum(counts[gate][_GATE_WORK] for gate in inside)
        modules[name] = Cost(
            parameters=_parameters(module),
            macs=_products(counts[name]) + outside_layers,
            activations=counts[name][_ACTIVATIONS],
            se_parameters=sum(_parameters(model.get_submodule(gate)) for gate in inside),
            se_macs=sum(gate_macs[gate] for gate in inside),
        )
    return Measured(modules, dict(analysis.unsupported_ops()))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _products(counts: Counter) -> int:
    return sum(n for kind, n in counts.items() if kind not in (_ACTIVATIONS, _GATE_WORK))


def _analysis(model: nn.Module, inputs: tuple[Tensor, ...]) -> FlopCountAnalysis:
    analysis = FlopCountAnalysis(model, inputs)
    # fvcore's default handles also count norms.
    analysis.clear_op_handles()
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    handles: dict[str, Handle | None] = {f"aten::{name}": None for name in _FREE}
    handles |= {f"aten::{name}": _with_activations(h) for name, h in _PRODUCTS.items()}
    handles |= {f"aten::{name}": _gate_handle(side) for name, side in _GATE.items()}
    return analysis.set_op_handle(**handles)


def _with_activations(handle: Handle) -> Handle:
    """Extend an fvcore operator handle to also count activations (output elements)."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter:
        found = handle(inputs, outputs)
        found = found if isinstance(found, Counter) else Counter({"product": found})
        return Counter({kind: int(n) for kind, n in found.items()}) + Counter(
            {_ACTIVATIONS: int(prod(get_shape(outputs[0])))}
        )

    return count


def _gate_handle(side: str) -> Handle:
    def count(inputs: list[Any], outputs: list[Any]) -> Counter:
        value = inputs[0] if side == "in" else outputs[0]
        # Products of scalars are shape arithmetic, which is not counted.
        return Counter({_GATE_WORK: int(prod(get_shape(value) or [0]))})

    return count
