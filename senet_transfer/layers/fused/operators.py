"""Operators that fuse batch norm, SE gate, residual addition and ReLU, with their gradients.

===============  =========================================================================
operator         result
===============  =========================================================================
`norm_gate_add`  ``relu(gate(norm(x)) * norm(x) + shortcut)``, the end of a residual block
`conv_gate_add`  the same with ``norm(conv(x))``, for a 1x1 convolution and a frozen norm
`gate_add_norm`  ``s = gate(x) * x + shortcut`` and ``relu(norm(s))`` (pre-activation)
===============  =========================================================================

The gate is optional, except in `conv_gate_add`. In `norm_gate_add`, norm, shortcut and ReLU are
optional, too.

Each operator exists in two forms, which use the same kernels:

* Eager code calls an autograd function. Its CPU overhead is a quarter of that of a custom operator,
  and it updates the running statistics in one of the kernels.
* Compiled code calls a custom operator, such as ``torch.ops.senet_transfer.norm_gate_add``. With
  its fake implementation and its registered gradient, it causes no graph breaks.

For the backward pass, the operators save the norm's input and the ReLU's output, as PyTorch does
for a block without a gate. They also save a few values per image and channel. With a frozen norm,
PyTorch saves only the ReLU's output, so `conv_gate_add` recomputes the convolution. If a
pre-activation block has a gate, `gate_add_norm` also saves the gate's input.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from senet_transfer.layers.fused import launch
from senet_transfer.layers.fused.launch import Maybe, is_channels_last

_Backward = Callable[..., tuple[Maybe, ...]]

_NORM = "Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias"
_GATE = "Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2"
_SAVED = "Tensor? pooled, Tensor? hidden, Tensor? value"


def _define(
    name: str, implementation: Callable[..., tuple[Maybe, ...]], arguments: str, results: int
) -> torch.library.CustomOpDef:
    """Register a custom operator that returns empty tensors for results that are not computed."""

    def run(*values: Any) -> tuple[Tensor, ...]:
        return _existing(implementation(*values), values)

    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    operator = f"senet_transfer::{name}"
    return torch.library.custom_op(operator, run, mutates_args=(), schema=schema)


def _existing(found: Sequence[Maybe], values: Sequence[Any]) -> tuple[Tensor, ...]:
    like = next(value for value in values if value is not None)
    return tuple(like.new_empty(0) if value is None else value for value in found)


def _needed(ctx: Any, found: Sequence[Maybe]) -> tuple[Maybe, ...]:
    """Return one gradient per input; None for inputs that don't require a gradient."""
    found = (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))
    return tuple(
        value if needed else None for value, needed in zip(found, ctx.needs_input_grad, strict=True)
    )


def _keep(ctx: Any, results: Sequence[Maybe], options: tuple[Any, ...], *tensors: Maybe) -> None:
    """Save tensors and options for the backward pass; mark ``results`` as non-differentiable."""
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[result for result in results if result is not None])


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(x: Tensor) -> Tensor:
    last = is_channels_last(x)
    return torch.empty_like(
        x, memory_format=torch.channels_last if last else torch.contiguous_format
    )


def _fake_saved(x: Tensor, squeezed: Maybe, w1: Maybe) -> tuple[Maybe, ...]:
    if w1 is None:
        return None, None, None
    dtype, n = _sums_dtype(x), len(x)
    pooled = (x if squeezed is None else squeezed).shape[1]
    return tuple(x.new_empty(n, size, dtype=dtype) for size in (pooled, len(w1), x.shape[1]))


def _fake_batch(x: Tensor, batch: bool) -> tuple[Maybe, Maybe]:
    if not batch:
        return None, None
    mean = x.new_empty(x.shape[1], dtype=_sums_dtype(x))
    return mean, torch.empty_like(mean)


def _fake_affine(x: Tensor, exists: bool) -> tuple[Maybe, Maybe]:
    return _fake_batch(x, exists)


def _fake_gate(*parameters: Maybe) -> tuple[Maybe, ...]:
    return tuple(None if p is None else torch.empty_like(p) for p in parameters)


# norm_gate_add


def _save_end(ctx: Any, inputs: tuple[Any, ...], output: tuple[Maybe, ...]) -> None:
    x, shortcut, squeezed, mean, var, weight, bias, *gate = inputs[:11]
    eps, batch, excitation, relu = inputs[11:15]
    out, batch_mean, batch_var, *saved = output
    if batch:
        mean, var = batch_mean, batch_var
    has_gate = gate[0] is not None
    sums = batch or any(ctx.needs_input_grad[5:7])
    ctx.is_squeezed_given = squeezed is not None
    options = (eps, batch, excitation, shortcut is not None, sums, is_channels_last(x))
    _keep(
        ctx,
        output[1:],
        options,
        out if relu else None,
        x if sums or has_gate else None,
        *(mean, var, weight, bias),
        *gate,
        *(saved if has_gate else (None, None, None)),
    )


def _end_gradients(ctx: Any, dout: Maybe, backward: _Backward) -> tuple[Maybe, ...]:
    if ctx.is_squeezed_given:
        raise RuntimeError(
            "norm_gate_add can't compute gradients if the gate is computed from a feature map "
            "other than x, as in networks returned by deploy(). Use the original network, or set "
            "fused to False."
        )
    if dout is None:
        return _needed(ctx, ())
    out, *tensors = ctx.saved_tensors
    dx, dshortcut, *found = backward(dout, out, *tensors, *ctx.options)
    if out is None:
        dshortcut = dout
    return _needed(ctx, (dx, dshortcut, None, None, None, *found))


def _fake_end(*values: Any) -> tuple[Tensor, ...]:
    x, _, squeezed = values[:3]
    found = (_like(x), *_fake_batch(x, values[12]), *_fake_saved(x, squeezed, values[7]))
    return _existing(found, values)


def _fake_end_backward(*values: Any) -> tuple[Tensor, ...]:
    dout, out = values[:2]
    gate = values[7:11]
    add, sums, last = values[17:]
    layout = torch.channels_last if last else torch.contiguous_format
    dx = torch.empty_like(dout, memory_format=layout)
    dshortcut = torch.empty_like(dx) if add and out is not None else None
    return _existing((dx, dshortcut, *_fake_affine(dout, sums), *_fake_gate(*gate)), values)


class NormGateAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Maybe, ...]:
        output = launch.end_forward(*arguments)
        _save_end(ctx, arguments, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Maybe, *_: None) -> tuple[Maybe, ...]:
        return _end_gradients(ctx, dout, launch.end_backward)


norm_gate_add = _define(
    "norm_gate_add",
    launch.end_forward,
    f"Tensor x, Tensor? shortcut, Tensor? squeezed, {_NORM}, {_GATE}, float eps, bool batch, "
    "str excitation, bool relu",
    6,
)
_norm_gate_add_backward = _define(
    "norm_gate_add_backward",
    launch.end_backward,
    f"Tensor dout, Tensor? out, Tensor? x, {_NORM}, {_GATE}, {_SAVED}, float eps, bool batch, "
    "str excitation, bool add, bool sums, bool last",
    8,
)
norm_gate_add.register_fake(_fake_end)
_norm_gate_add_backward.register_fake(_fake_end_backward)
norm_gate_add.register_autograd(
    lambda ctx, dout, *_: _end_gradients(ctx, dout, _norm_gate_add_backward),
    setup_context=lambda ctx, inputs, output: _save_end(ctx, inputs, output),
)


# conv_gate_add


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Maybe, ...]) -> None:
    x, kernel, _, *tensors = inputs[:11]
    eps, excitation, relu = inputs[11:]
    out, *saved = output
    _keep(ctx, saved, (eps, excitation), out if relu else None, x, kernel, *tensors, *saved)


def _conv_gradients(ctx: Any, dout: Maybe, backward: _Backward) -> tuple[Maybe, ...]:
    if dout is None:
        return _needed(ctx, ())
    out, *tensors = ctx.saved_tensors
    dx, dkernel, dshortcut, *found = backward(dout, out, *tensors, *ctx.options)
    if out is None:
        dshortcut = dout
    return _needed(ctx, (dx, dkernel, dshortcut, None, None, None, None, *found))


def _fake_conv(*values: Any) -> tuple[Tensor, ...]:
    x = torch.nn.functional.conv2d(*values[:2])
    return _existing((_like(x), *_fake_saved(x, None, values[7])), values)


def _fake_conv_backward(*values: Any) -> tuple[Tensor, ...]:
    dout, out, x, kernel = values[:4]
    dshortcut = None if out is None else _like(torch.nn.functional.conv2d(x, kernel))
    found = torch.empty_like(x), torch.empty_like(kernel)
    return _existing((*found, dshortcut, *_fake_gate(*values[8:12])), values)


class ConvGateAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Maybe, ...]:
        output = launch.conv_forward(*arguments)
        _save_conv(ctx, arguments, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Maybe, *_: None) -> tuple[Maybe, ...]:
        return _conv_gradients(ctx, dout, launch.conv_backward)


conv_gate_add = _define(
    "conv_gate_add",
    launch.conv_forward,
    f"Tensor x, Tensor kernel, Tensor shortcut, {_NORM}, {_GATE}, float eps, str excitation, "
    "bool relu",
    4,
)
_conv_gate_add_backward = _define(
    "conv_gate_add_backward",
    launch.conv_backward,
    f"Tensor dout, Tensor? out, Tensor x, Tensor kernel, {_NORM}, {_GATE}, {_SAVED}, float eps, "
    "str excitation",
    7,
)
conv_gate_add.register_fake(_fake_conv)
_conv_gate_add_backward.register_fake(_fake_conv_backward)
conv_gate_add.register_autograd(
    lambda ctx, dout, *_: _conv_gradients(ctx, dout, _conv_gate_add_backward),
    setup_context=lambda ctx, inputs, output: _save_conv(ctx, inputs, output),
)


# gate_add_norm


def _save_preact(ctx: Any, inputs: tuple[Any, ...], output: tuple[Maybe, ...]) -> None:
    x, _, mean, var, weight, bias, *gate = inputs[:10]
    eps, batch, excitation = inputs[10:13]
    added, out, batch_mean, batch_var, *saved = output
    if batch:
        mean, var = batch_mean, batch_var
    has_gate = gate[0] is not None
    sums = batch or any(ctx.needs_input_grad[4:6])
    _keep(
        ctx,
        output[2:],
        (eps, batch, excitation, sums),
        out,
        added if sums else None,
        x if has_gate else None,
        *(mean, var, weight, bias),
        *gate,
        *(saved if has_gate else (None, None, None)),
    )


def _preact_gradients(
    ctx: Any, dadded: Maybe, dout: Maybe, backward: _Backward
) -> tuple[Maybe, ...]:
    out, *tensors = ctx.saved_tensors
    if dout is None and dadded is None:
        return _needed(ctx, ())
    dout = torch.zeros_like(out) if dout is None else dout
    dx, dshortcut, *found = backward(dadded, dout, out, *tensors, *ctx.options)
    if tensors[1] is None:
        dx = dshortcut
    return _needed(ctx, (dx, dshortcut, None, None, *found))


def _fake_preact(*values: Any) -> tuple[Tensor, ...]:
    x = values[0]
    found = _like(x), _like(x), *_fake_batch(x, values[11]), *_fake_saved(x, None, values[6])
    return _existing(found, values)


def _fake_preact_backward(*values: Any) -> tuple[Tensor, ...]:
    out, gate = values[2], values[9:13]
    dx = None if gate[0] is None else _like(out)
    found = dx, _like(out), *_fake_affine(out, values[-1]), *_fake_gate(*gate)
    return _existing(found, values)


class GateAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Maybe, ...]:
        output = launch.preact_forward(*arguments)
        _save_preact(ctx, arguments, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dadded: Maybe, dout: Maybe, *_: None) -> tuple[Maybe, ...]:
        return _preact_gradients(ctx, dadded, dout, launch.preact_backward)


gate_add_norm = _define(
    "gate_add_norm",
    launch.preact_forward,
    f"Tensor x, Tensor shortcut, {_NORM}, {_GATE}, float eps, bool batch, str excitation",
    7,
)
_gate_add_norm_backward = _define(
    "gate_add_norm_backward",
    launch.preact_backward,
    f"Tensor? dadded, Tensor dout, Tensor out, Tensor? added, Tensor? x, {_NORM}, {_GATE}, "
    f"{_SAVED}, float eps, bool batch, str excitation, bool sums",
    8,
)
gate_add_norm.register_fake(_fake_preact)
_gate_add_norm_backward.register_fake(_fake_preact_backward)
gate_add_norm.register_autograd(
    lambda ctx, dadded, dout, *_: _preact_gradients(ctx, dadded, dout, _gate_add_norm_backward),
    setup_context=lambda ctx, inputs, output: _save_preact(ctx, inputs, output),
)
