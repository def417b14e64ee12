"""Parameters, multiply-accumulates and activations of a model, and SE's share of them.

What counts as a multiply-accumulate follows the paper's figures: those of convolutions, linear
layers and matrix products, and of the gates besides their two layers the sums of the pooling and
the products with the feature map, one an element. These make the difference between the paper's
3.86 and 3.87 GFLOPs, and fvcore alone does not count them. Norms are not counted, since they fold
into the convolution before them, and neither is what else has no products or no weights: other
pooling, sums, scales, non-linearities.
"""

from collections import Counter
from dataclasses import astuple, dataclass, replace
from math import prod
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis, jit_handles
from fvcore.nn.jit_handles import Handle, get_shape
from torch import Tensor, nn

from senet_transfer.layers.squeeze_excitation import SqueezeExcitation

# Convolutions and matrix products, with fvcore's counts of them.
_PRODUCTS: dict[str, Handle] = {
    "_convolution": jit_handles.conv_flop_jit,
    "linear": jit_handles.linear_flop_jit,
    "addmm": jit_handles.addmm_flop_jit,
    "mm": jit_handles.matmul_flop_jit,
    "bmm": jit_handles.bmm_flop_jit,
    "matmul": jit_handles.matmul_flop_jit,
    "einsum": jit_handles.einsum_flop_jit,
}

# What gates do besides, and whether the elements that come in count, or those that go out.
_GATE = {"mean": "in", "amax": "in", "mul": "out", "addcmul": "out"}

# Known to be none of these; fvcore knows more of them by itself.
_FREE = (
    "adaptive_avg_pool2d", "add", "add_", "avg_pool2d", "batch_norm", "channel_shuffle", "clone",
    "div", "group_norm", "lerp", "max_pool2d", "meshgrid", "mul_", "pad", "reciprocal", "rsqrt",
    "rsub", "sigmoid", "sigmoid_", "softmax", "sub", "tanh", "unflatten", "upsample_nearest2d",
)  # fmt: skip

_ACTIVATIONS, _GATE_WORK = "activations", "gate"


@dataclass(frozen=True)
class Cost:
    """What a module costs in one forward pass.

    Attributes:
        parameters: weights and biases, frozen ones too; running statistics of norms are none.
        macs: multiply-accumulates; see above.
        activations: elements that convolutions and linear layers put out.
        se_parameters: of the parameters, the gates'.
        se_macs: of the multiply-accumulates, likewise.
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
        """The same weights, used this many times."""
        return replace(
            self,
            macs=times * self.macs,
            activations=times * self.activations,
            se_macs=times * self.se_macs,
        )


@dataclass(frozen=True)
class Measured:
    """What a forward pass was found to cost.

    Attributes:
        modules: by name, each with all that is in it; "" is the whole model.
        unknown: operators that were neither counted nor known to be free, and how often they ran.
    """

    modules: dict[str, Cost]
    unknown: dict[str, int]

    @property
    def total(self) -> Cost:
        """Of the whole model."""
        return self.modules[""]


def measure(model: nn.Module, *inputs: Tensor) -> Measured:
    """Counts one forward pass in evaluation mode.

    Args:
        model: any module; the gates in it are those of :class:`SqueezeExcitation`.
        inputs: of its forward pass; counts are of all their images together.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    analysis = _analysis(model, inputs)
    with torch.no_grad():
        counts = analysis.by_module_and_operator()
    for module, training in modes.items():
        module.training = training
    gates = {name for name, m in model.named_modules() if isinstance(m, SqueezeExcitation)}
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
    # Its own handles count norms, too.
    analysis.clear_op_handles()
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    handles: dict[str, Handle | None] = {f"aten::{name}": None for name in _FREE}
    handles |= {f"aten::{name}": _with_activations(h) for name, h in _PRODUCTS.items()}
    handles |= {f"aten::{name}": _gate_handle(side) for name, side in _GATE.items()}
    return analysis.set_op_handle(**handles)


def _with_activations(handle: Handle) -> Handle:
    """fvcore's handle, which counts the elements of the output beside."""

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
        # Products of numbers, not of maps, are arithmetic on shapes.
        return Counter({_GATE_WORK: int(prod(get_shape(value) or [0]))})

    return count
