"""Functions that compute parts of residual blocks, with the fused operators where possible.

A layer's option ``fused`` has one of these values:

* True: Use the fused operators. Raise an error if they cannot run on the device.
* False: Use PyTorch's operators.
* "auto": Use the fused operators in eager mode on a GPU, except for batch norms in training mode
  without a gate. For these norms, the fused kernels are faster than PyTorch's on the GPU, but their
  launch overhead on the CPU is higher. CUDA graphs avoid this overhead, so the trainer sets the
  option to True if it uses CUDA graphs. Under ``torch.compile``, "auto" uses PyTorch's operators,
  which the compiler itself fuses.

PyTorch's operators are always used for modules with hooks and for modules that the fused operators
do not support, such as SyncBN and gates without average pooling.
"""

import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.fused import operators
from senet_transfer.layers.fused.launch import Running
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation
from senet_transfer.utils.private_api import has_hooks, intercepts_operators

FUSED = ("auto", True, False)

# Triton must not be imported before a kernel is launched, because importing it takes a second and
# CPU-only installations do not include it.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Fusable:
    """Mixin for modules that can use fused kernels, depending on the attribute ``fused``."""

    fused: str | bool = "auto"


def set_fused(model: nn.Module, fused: str | bool) -> None:
    """Set the option ``fused`` of all :class:`Fusable` modules in a network.

    Args:
        model: The network.
        fused: "auto", True or False. The option has no effect on parameters, buffers or
            checkpoints.

    Raises:
        UserError: If ``fused`` has any other value.
    """
    check_fused(fused)
    for module in model.modules():
        if isinstance(module, Fusable):
            module.fused = fused


def check_fused(fused: object, name: str = "fused") -> None:
    """Raise a UserError unless ``fused`` is "auto", True or False."""
    if fused != "auto" and not isinstance(fused, bool):
        raise UserError(
            f"{name} is {fused!r}; expected 'auto' (fused kernels on a GPU), True or False."
        )


def uses_kernels(fused: str | bool, x: Tensor) -> bool:
    """Return whether to use fused kernels for a tensor, given its device and the option ``fused``.

    Raises:
        UserError: If ``fused`` is True, but the kernels cannot run on the tensor's device.
    """
    if fused is False:
        return False
    device = x.device.type
    if device == "cuda" and _HAS_TRITON:
        return True
    if fused == "auto" or (_INTERPRETED and _HAS_TRITON):
        return fused is True
    if not _HAS_TRITON:
        raise UserError(
            "fused is True, but Triton, which compiles the fused kernels, is not installed. "
            "Install it, or set fused (MODEL.SE.FUSED) to 'auto'."
        )
    raise UserError(
        f"fused is True, but the feature maps are on the device {device!r} and the fused kernels "
        "require a CUDA GPU. Set fused (MODEL.SE.FUSED) to 'auto'. To test the kernels on a CPU in "
        "Triton's interpreter, set the environment variable TRITON_INTERPRET to 1 before starting "
        "Python."
    )


def norm_gate_add(
    norm: nn.Module | None,
    se: SqueezeExcitation | None,
    x: Tensor,
    shortcut: Tensor | None,
    squeezed: Tensor | None = None,
    *,
    relu: bool = True,
) -> Tensor:
    """Compute ``relu(gate(norm(x)) * norm(x) + shortcut)`` with the fused kernels.

    Args:
        norm: BatchNorm2d with running statistics, or FrozenBatchNorm2d; None for no norm layer.
        se: SE module with average pooling; None for a block without SE.
        x: Feature map ``(N, C, H, W)``.
        shortcut: Feature map of the same shape and dtype; None for no residual addition.
        squeezed: Feature map ``(N, K, H, W)`` from which the gate is computed, for inference only.
            None computes the gate from ``norm(x)``.
        relu: Whether to apply the ReLU.
    """
    batch, values, eps = _norm_values(norm)
    gate, excitation = _gate_values(se)
    options = (x, shortcut, squeezed, *values, *gate, eps, batch, excitation, relu)
    return _call(norm, operators.NormGateAdd, operators.norm_gate_add, *options)[0]


def conv_norm_relu(conv: Conv2d, x: Tensor, fused: str | bool) -> Tensor:
    """Return ``relu(conv(x))`` for a Detectron2 ``Conv2d`` with a norm layer.

    Fused kernels are used if possible.
    """
    out = residual_end(conv, None, x, None, fused)
    return F.relu_(conv(x)) if out is None else out


def conv_norm(conv: Conv2d, x: Tensor, fused: str | bool) -> Tensor:
    """Return ``conv(x)`` for a Detectron2 ``Conv2d`` with a norm layer.

    Fused kernels are used if possible.
    """
    out = residual_end(conv, None, x, None, fused, relu=False)
    return conv(x) if out is None else out


def residual_end(
    conv: Conv2d,
    se: SqueezeExcitation | None,
    x: Tensor,
    shortcut: Tensor | None,
    fused: str | bool,
    *,
    relu: bool = True,
) -> Tensor | None:
    """Return ``relu(gate(r) * r + shortcut)`` with ``r = conv(x)``, computed with fused kernels.

    Return None if the fused kernels are disabled or do not support the arguments.

    Args:
        conv: The last convolution of the residual branch, with its norm.
        se: SE module applied to the convolution's output; None for a block without SE.
        x: Input of the convolution, ``(N, K, H, W)``.
        shortcut: Output of the shortcut, ``(N, C, H / stride, W / stride)``; None for no shortcut.
        fused: The block's ``fused`` option.
        relu: Whether to apply the ReLU.
    """
    norm = conv.norm
    if norm is None and shortcut is None:
        return None  # At most a ReLU is left, so there is nothing to fuse.
    if conv.activation is not None or not _is_selected(fused, x, norm, se, conv):
        return None
    squeezed = x if se is not None and se.takes_input else None
    if se is not None and se.takes_input and _learns(conv, se, x, shortcut):
        return None  # The operator has no gradient for the feature map that the gate reads.
    if shortcut is not None and se is not None and _repeats_conv(conv, se, x, shortcut):
        (_, values, eps), (gate, excitation) = _norm_values(norm), _gate_values(se)
        weight = conv.weight.to(x.dtype)
        compiling = torch.compiler.is_compiling()
        operator = operators.conv_gate_add if compiling else operators.ConvGateAdd.apply
        return operator(x, weight, shortcut, *values, *gate, eps, excitation, relu)[0]
    out = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    fits = shortcut is None or (out.dtype == shortcut.dtype and out.shape == shortcut.shape)
    if fits and not _lacks_variance(norm, out):
        return norm_gate_add(norm, se, out, shortcut, squeezed, relu=relu)
    out = out if norm is None else norm(out)
    if shortcut is not None:
        out = out + shortcut if se is None else se.gate_and_add(out, shortcut)
    return F.relu(out) if relu else out


def norm_relu(norm: nn.Module, x: Tensor, fused: str | bool) -> Tensor:
    """Return ``relu(norm(x))``, computed with fused kernels if possible."""
    if not _is_selected(fused, x, norm, None) or _lacks_variance(norm, x):
        return F.relu_(norm(x))
    return norm_gate_add(norm, None, x, None, None)


def gate_and_add(
    se: SqueezeExcitation, x: Tensor, shortcut: Tensor, fused: str | bool, scale: float = 1.0
) -> Tensor:
    """Return ``scale * gate(x) * x + shortcut``, computed with fused kernels if possible.

    Args:
        se: SE module applied to ``x``.
        x: Output of the residual branch, ``(N, C, H, W)``.
        shortcut: Output of the shortcut, ``(N, C, H, W)``.
        fused: The block's ``fused`` option.
        scale: Factor of the gated branch. The fused kernels are used only if it is 1.
    """
    fits = scale == 1 and x.dtype == shortcut.dtype and x.shape == shortcut.shape
    if not fits or se.takes_input or not _is_selected(fused, x, None, se):
        return se.gate_and_add(x, shortcut, scale)
    return norm_gate_add(None, se, x, shortcut, None, relu=False)


def gate_add_norm(
    se: SqueezeExcitation | None, norm: nn.Module, x: Tensor, shortcut: Tensor, fused: str | bool
) -> tuple[Tensor, Tensor] | None:
    """Return ``s = gate(x) * x + shortcut`` and ``relu(norm(s))``, computed with fused kernels.

    Return None if the fused kernels are disabled or do not support the arguments.

    Args:
        se: SE module applied to ``x``; None for a block without SE.
        norm: The norm layer applied to the residual sum, i.e. the first norm layer of the next
            pre-activation block.
        x: Output of the residual branch, ``(N, C, H, W)``.
        shortcut: Output of the shortcut, ``(N, C, H, W)``.
        fused: The block's ``fused`` option.
    """
    if not _is_selected(fused, x, norm, se) or _lacks_variance(norm, x):
        return None
    if x.dtype != shortcut.dtype or x.shape != shortcut.shape:
        return None
    batch, values, eps = _norm_values(norm)
    gate, excitation = _gate_values(se)
    options = (x, shortcut, *values, *gate, eps, batch, excitation)
    found = _call(norm, operators.GateAddNorm, operators.gate_add_norm, *options, position=2)
    return found[0], found[1]


def _is_selected(
    fused: str | bool,
    x: Tensor,
    norm: nn.Module | None,
    se: SqueezeExcitation | None,
    *others: nn.Module,
) -> bool:
    """Return whether the fused kernels are enabled and support the given tensor and modules."""
    if not uses_kernels(fused, x):
        return False
    compiling = torch.compiler.is_compiling()
    needs_no_kernel = se is None and norm is not None and _uses_batch(norm)
    if fused == "auto" and (compiling or needs_no_kernel):
        return False
    modules = [*others, *([norm] if norm else []), *([se, se.fc1, se.fc2] if se else [])]
    return (
        x.dim() == 4
        and x.numel() > 0
        and x.is_floating_point()
        and (x.dtype != torch.float64 or x.device.type == "cpu")
        and (se is None or se.squeeze == "avg")
        and (norm is None or _is_supported(norm))
        and (compiling or not (torch.jit.is_tracing() or intercepts_operators()))
        and not any(map(has_hooks, modules))
    )


def _is_supported(norm: nn.Module) -> bool:
    if type(norm) is FrozenBatchNorm2d:
        return True
    has_statistics = type(norm) is nn.BatchNorm2d and norm.running_mean is not None
    return has_statistics and norm.affine and norm.momentum is not None


def _uses_batch(norm: nn.Module) -> bool:
    """Return whether a norm layer uses batch statistics and updates its running statistics."""
    return norm.training and type(norm) is nn.BatchNorm2d


def _lacks_variance(norm: nn.Module | None, x: Tensor) -> bool:
    """Return whether a norm in training mode can't compute a variance.

    The variance is undefined if ``x`` has only one value per channel.
    """
    return norm is not None and norm.training and x.numel() == x.shape[1]


def _learns(conv: Conv2d, se: SqueezeExcitation, x: Tensor, shortcut: Tensor | None) -> bool:
    """Return whether any feature map or parameter requires a gradient and autograd is enabled."""
    tensors = (x, shortcut, *conv.parameters(), *se.parameters())
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _repeats_conv(conv: Conv2d, se: SqueezeExcitation, x: Tensor, shortcut: Tensor) -> bool:
    """Return whether to recompute the convolution's output in the backward pass.

    Without recomputation, a block with a gate and a frozen norm would save this output for the
    backward pass, in addition to the feature maps that a block without a gate saves.
    """
    one = (1, 1)
    is_pointwise = conv.kernel_size == conv.stride == one and conv.padding == (0, 0)
    return (
        type(conv.norm) is FrozenBatchNorm2d
        and is_pointwise
        and conv.groups == 1
        and conv.bias is None
        and not se.takes_input
        and torch.is_grad_enabled()
        and x.dtype == shortcut.dtype
        and not (x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type))
    )


_Statistics = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _norm_values(norm: nn.Module | None) -> tuple[bool, _Statistics, float]:
    """Return a norm layer's arguments for the fused operators.

    The arguments are a flag that is True for batch statistics, the tensors of the norm layer (mean,
    variance, weight and bias), and epsilon.
    """
    if norm is None:
        return False, (None, None, None, None), 0.0
    eps = float(norm.eps)  # Triton would compile different code for an integer.
    if _uses_batch(norm):
        return True, (None, None, norm.weight, norm.bias), eps
    return False, (norm.running_mean, norm.running_var, norm.weight, norm.bias), eps


def _gate_values(
    se: SqueezeExcitation | None,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], str]:
    if se is None:
        return (None, None, None, None), ""
    return (se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias), se.excitation


def _call(
    norm: nn.Module | None,
    function: type[torch.autograd.Function],
    operator: Any,
    *options: Any,
    position: int = 1,
) -> Any:
    """Call the autograd function or the custom operator, and update the running statistics.

    Args:
        norm: Norm layer, whose running statistics are updated in training; None for no norm layer.
        function: The autograd function, which is called in eager mode. It updates the running
            statistics itself.
        operator: The custom operator, which is called under ``torch.compile``.
        options: Arguments of the operator.
        position: Index of the batch mean in the operator's results. The batch variance is the next
            result.
    """
    trained = norm if norm is not None and _uses_batch(norm) else None
    if not torch.compiler.is_compiling():
        running = None
        if trained is not None:
            statistics = trained.running_mean, trained.running_var, trained.num_batches_tracked
            running = Running(*statistics, float(trained.momentum))
        return function.apply(*options, running)
    found = operator(*options)
    if trained is not None:
        mean, var = found[position : position + 2]
        count = found[0].numel() // found[0].shape[1]
        with torch.no_grad():
            trained.num_batches_tracked.add_(1)
            _move(trained.running_mean, mean, trained.momentum)
            _move(trained.running_var, var * (count / (count - 1)), trained.momentum)
    return found


def _move(average: Tensor, value: Tensor, momentum: float) -> None:
    average.lerp_(value.to(average.dtype), momentum)
