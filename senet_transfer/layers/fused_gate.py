"""Memory-efficient CPU implementation of SE gating and the residual addition.

In the expression ``gate(r) * r + y`` with ``r = norm(conv(x))``, autograd saves ``r`` for the
backward pass. A block without a gate does not need ``r``. The functions in this module compute the
same result, up to rounding, but save only tensors that a block without a gate saves, too:

* A batch norm, in training or evaluation mode, saves the convolution's output. The gradients of the
  gate and the norm are computed from this output and two sums per image and channel. One further
  pass computes the gradient of the convolution's output (:class:`_NormSum`).
* A frozen norm saves no feature map. It only scales and shifts channels, so it is folded into the
  weights of a 1x1 convolution. The gradient of these weights, computed per image, also yields the
  gradient of the gates (:class:`_LargeConvSum`). For small feature maps and many weights, it is
  cheaper to recompute the convolution (:class:`_SmallConvSum`).
* The mean over positions commutes with a 1x1 convolution and with a norm with fixed statistics. The
  squeeze can therefore read the convolution's input. In a bottleneck, the input has a quarter of
  the output's channels.

On other devices, the expression is evaluated as written. The same applies to modules with hooks, to
compilation, tracing and dispatch modes, and to variants that these methods do not support. For the
kernels used on GPUs, see :mod:`senet_transfer.layers.fused`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from senet_transfer.layers.squeeze_excitation import SqueezeExcitation, mean_of_maps
from senet_transfer.utils.private_api import has_hooks, intercepts_operators

# Maximum number of positions (H * W) for which recomputing the convolution is cheaper than
# computing the weight gradient per image. Reading one value of this gradient from memory takes as
# long as one or two hundred multiplications.
_FEW_POSITIONS = 256


def gated_sum(conv: Conv2d, se: SqueezeExcitation, x: Tensor, shortcut: Tensor) -> Tensor:
    """Return ``se.gate_and_add(conv(x), shortcut)``, up to rounding.

    The memory-efficient implementations do not support second derivatives. The module docstring
    lists the cases in which ``conv`` and ``se.gate_and_add`` are called instead.

    Args:
        conv: The last convolution of the residual branch, with its norm.
        se: SE module applied to the convolution's output.
        x: Input of the convolution, ``(N, K, H, W)``.
        shortcut: Output of the shortcut, ``(N, C, H / stride, W / stride)``.

    Returns:
        The sum, of the same shape as ``shortcut``.
    """
    form = _choose(conv, se, x, shortcut)
    if form is not None:
        return form(conv, se, x, shortcut)
    if se.takes_input:
        return torch.addcmul(shortcut, conv(x), _spread(se.excite(x.mean((2, 3)))))
    return se.gate_and_add(conv(x), shortcut)


def fold_squeeze(conv: Conv2d, se: SqueezeExcitation) -> None:
    """Fold a convolution into ``fc1`` of its SE module, which then pools the convolution's input.

    In a bottleneck, this makes ``fc1`` and the pooled feature map four times smaller. The result is
    for inference only; see :func:`senet_transfer.export.deploy`. Unsupported convolutions and SE
    modules stay unchanged.

    Args:
        conv: The convolution before the SE module, with its norm already folded into it.
        se: SE module, whose ``fc1`` is replaced. Afterwards, only :func:`gated_sum` and the fused
            kernels can use the module.
    """
    if not _is_pointwise(conv) or conv.norm is not None or se.squeeze != "avg":
        return
    weight, fc1 = conv.weight.flatten(1).double(), se.fc1.weight.double()
    bias = torch.zeros(len(fc1)) if se.fc1.bias is None else se.fc1.bias
    bias = bias.to(fc1) + fc1 @ conv.bias.double()
    linear = nn.Linear(conv.in_channels, len(fc1), device="meta")
    linear.weight, linear.bias = (
        nn.Parameter(value.to(conv.weight.dtype), requires_grad=False)
        for value in (fc1 @ weight, bias)
    )
    se.fc1, se.takes_input = linear, True


def _choose(
    conv: Conv2d, se: SqueezeExcitation, x: Tensor, shortcut: Tensor
) -> Callable[[Conv2d, SqueezeExcitation, Tensor, Tensor], Tensor] | None:
    norm = conv.norm
    frozen = type(norm) is FrozenBatchNorm2d
    batch_norm = type(norm) is nn.BatchNorm2d and norm.affine and norm.running_mean is not None
    batch_norm = batch_norm and norm.momentum is not None
    folded = norm is None and conv.bias is not None  # See `senet_transfer.export.deploy`.
    if (
        x.device.type != "cpu"
        or not (frozen or batch_norm or folded)
        or (conv.bias is not None and not folded)
        or conv.activation is not None
        or se.squeeze != "avg"
        or x.dtype != shortcut.dtype
        or x.numel() == 0
        or _needs_plain_calls(conv, se, se.fc1, se.fc2, *([norm] if norm else []))
    ):
        return None
    learns = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, shortcut, *conv.parameters(), *se.parameters())
    )
    if not learns:
        changes = batch_norm and norm.training
        return None if changes or torch.is_autocast_enabled(x.device.type) else _inferred_sum
    if batch_norm:
        return _norm_sum
    return _conv_sum if frozen and _is_pointwise(conv) else None


def _needs_plain_calls(*modules: nn.Module) -> bool:
    """Return whether hooks, compilation, tracing or a dispatch mode prevent fusing the modules."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or intercepts_operators()
        or any(map(has_hooks, modules))
    )


def _is_pointwise(conv: Conv2d) -> bool:
    one = (1, 1)
    return conv.kernel_size == conv.stride == one and conv.padding == (0, 0) and conv.groups == 1


def _fold(norm: FrozenBatchNorm2d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the per-channel scale and shift that are equivalent to a norm in evaluation mode."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class _Gate:
    """Gates computed from pooled features, with a separate autograd graph.

    A custom autograd function holds this graph and calls :meth:`backward` in its backward pass.
    """

    def __init__(self, se: SqueezeExcitation, squeezed: Tensor, learns: bool):
        self.parameters = [p for p in se.parameters() if p.requires_grad]
        with torch.set_grad_enabled(learns):
            self.squeezed = squeezed.detach().requires_grad_(learns)
            self.value = se.excite(self.squeezed)

    def backward(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the pooled features and of the trainable parameters."""
        inputs = [self.squeezed, *self.parameters]
        # Retain the graph, because the outer backward pass may run more than once.
        found = torch.autograd.grad(
            self.value, inputs, gradient.to(self.value.dtype), retain_graph=True
        )
        return found[0], list(found[1:])


def _learning(se: SqueezeExcitation) -> list[nn.Parameter]:
    return [parameter for parameter in se.parameters() if parameter.requires_grad]


def _norm_sum(conv: Conv2d, se: SqueezeExcitation, x: Tensor, shortcut: Tensor) -> Tensor:
    norm = conv.norm
    x = _conv_forward(conv, x, conv.weight, None)
    # Under autocast, the convolution's output and the shortcut may have different dtypes. If there
    # is a single value per channel, the norm raises an error about the missing variance.
    if x.dtype != shortcut.dtype or x.numel() == x.shape[1]:
        return se.gate_and_add(norm(x), shortcut)
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return _NormSum.apply(x, shortcut, norm.weight, norm.bias, norm, se, *_learning(se))


class _NormSum(torch.autograd.Function):
    """Autograd function for ``gate(r) * r + shortcut`` with ``r = norm(x)``.

    The backward pass computes all gradients from ``x``, so ``r`` is not saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: nn.Module,
        se: SqueezeExcitation,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.training = norm.training
        out, mean, invstd = torch.native_batch_norm(
            x,
            weight,
            bias,
            norm.running_mean,
            norm.running_var,
            norm.training,
            norm.momentum,
            norm.eps,
        )
        if not norm.training:
            mean, invstd = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
        centre = x.mean((2, 3), dtype=mean.dtype)
        squeezed = torch.addcmul(bias, centre - mean, invstd * weight)
        ctx.gate = _Gate(se, squeezed.to(x.dtype), learns=True)
        gate = ctx.gate.value.detach()
        ctx.save_for_backward(x, weight, bias, mean, invstd, centre, gate)
        return torch.addcmul(shortcut, out, _spread(gate, x), out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, centre, gate = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        positions = x.shape[2] * x.shape[3]
        # Sums of the gradient and of its product with the normalised feature map.
        total, aligned = _sums(gradient, x, mean, invstd)
        squeezed, parameters = ctx.gate.backward(aligned * weight + total * bias)
        dbias = torch.addcmul(squeezed, gate, total).sum(0)
        dweight = torch.addcmul(squeezed * (centre - mean) * invstd, gate, aligned).sum(0)
        dx = None
        if ctx.needs_input_grad[0]:
            scale = weight * invstd
            constant = scale * squeezed / positions
            slope = None
            if ctx.training:  # The batch mean and variance also depend on x.
                share = scale / (len(x) * positions)
                slope = -share * dweight * invstd
                constant = constant - share * dbias - slope * mean
            dx = torch.addcmul(_spread(constant), gradient, _spread(scale * gate))
            if slope is not None:
                dx.addcmul_(x, slope[:, None, None])
            dx = dx.to(x.dtype)
        shortcut = gradient if ctx.needs_input_grad[1] else None
        return dx, shortcut, dweight, dbias, None, None, *parameters


def _sums(gradient: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of ``gradient`` and of ``gradient * normalised x`` per image and channel."""
    # PyTorch's batch norm backward computes these sums over the batch in one pass. Calling it per
    # image, only for these sums, is twice as fast as summing the products.
    sums = [
        torch.ops.aten.native_batch_norm_backward(
            part, image, None, None, None, mean, invstd, True, 0.0, [False, True, True]
        )
        for part, image in zip(gradient.split(1), x.split(1), strict=True)
    ]
    return torch.stack([row[2] for row in sums]), torch.stack([row[1] for row in sums])


def _conv_sum(conv: Conv2d, se: SqueezeExcitation, x: Tensor, shortcut: Tensor) -> Tensor:
    scale, shift = _fold(conv.norm)
    large = x.shape[2] * x.shape[3] > _FEW_POSITIONS
    function = _LargeConvSum if large else _SmallConvSum
    return function.apply(x, shortcut, conv.weight, scale, shift, se, *_learning(se))


class _SmallConvSum(torch.autograd.Function):
    """Autograd function for ``shortcut + gate * norm(conv(x))``, for small feature maps.

    The convolution is 1x1 and the norm is frozen. The backward pass recomputes the convolution.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        se: SqueezeExcitation,
        *parameters: Tensor,
    ) -> Tensor:
        out = _convolve(x, _folded(weight, scale, x.dtype), shift)
        ctx.gate = _Gate(se, out.mean((2, 3)), learns=True)
        gate = ctx.gate.value.detach().to(x.dtype)
        ctx.save_for_backward(x, weight, scale, shift, gate)
        return torch.addcmul(shortcut, out, _spread(gate), out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, gate = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        folded = _folded(weight, scale, x.dtype)
        out = _convolve(x, folded, shift)
        dgate = torch.einsum("nchw,nchw->nc", gradient, out)
        squeezed, parameters = ctx.gate.backward(dgate)
        constant = _spread(squeezed.to(x.dtype) / (x.shape[2] * x.shape[3]))
        dout = torch.addcmul(constant, gradient, _spread(gate), out=out)
        dx, dfolded = _conv_backward(dout, x, folded, ctx.needs_input_grad[0])
        dweight = (dfolded * scale[:, None, None, None]).to(weight.dtype)
        shortcut = gradient if ctx.needs_input_grad[1] else None
        return dx, shortcut, dweight, None, None, None, *parameters


class _LargeConvSum(torch.autograd.Function):
    """Autograd function for ``shortcut + gate * norm(conv(x))``, for large feature maps.

    The convolution is 1x1 and the norm is frozen. To save memory, the output of the convolution is
    not stored. The gate's gradient depends on this output, but can be computed from the weight
    gradients of the single images, which costs less than recomputing the convolution.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        se: SqueezeExcitation,
        *parameters: Tensor,
    ) -> Tensor:
        folded, mean = _folded(weight, scale, x.dtype), x.mean((2, 3))
        squeezed = F.linear(mean, folded.flatten(1), shift.to(x.dtype))
        ctx.gate = _Gate(se, squeezed, learns=True)
        gate = ctx.gate.value.detach().to(x.dtype)
        ctx.save_for_backward(x, weight, scale, shift, mean, gate)
        out = _convolve(x, folded, shift)
        return torch.addcmul(shortcut, out, _spread(gate), out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, mean, gate = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        folded = _folded(weight, scale, x.dtype)
        dx, dfolded, dgate = _by_image(gradient, x, folded, gate, ctx.needs_input_grad[0])
        dgate += shift * gradient.sum((2, 3))
        squeezed, parameters = ctx.gate.backward(dgate)
        dfolded += squeezed.mT.to(dfolded.dtype) @ mean.to(dfolded.dtype)
        dweight = (dfolded * scale[:, None]).view_as(weight).to(weight.dtype)
        if dx is not None:
            positions = x.shape[2] * x.shape[3]
            dx += _spread(squeezed.to(x.dtype) @ folded.flatten(1) / positions)
        shortcut = gradient if ctx.needs_input_grad[1] else None
        return dx, shortcut, dweight, None, None, None, *parameters


def _by_image(
    gradient: Tensor, x: Tensor, folded: Tensor, gate: Tensor, learns: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of ``x``, the folded weights and the gates, computed image by image.

    The caller adds the gradients that flow back through the SE gate's pooled features.
    """
    dx = torch.empty_like(x, memory_format=_layout(x)) if learns else None
    wide = torch.promote_types(folded.dtype, torch.float32)
    dfolded = torch.zeros_like(folded.flatten(1), dtype=wide)
    dgate = torch.empty_like(gate)
    for image in range(len(x)):
        part, own = slice(image, image + 1), gate[image, :, None]
        scaled = folded * own[..., None, None]
        found, product = _conv_backward(gradient[part], x[part], scaled, learns)
        product = product.flatten(1)
        dgate[image] = torch.einsum("ck,ck->c", folded.flatten(1), product)
        dfolded.addcmul_(product, own)
        if dx is not None:
            dx[part] = found
    return dx, dfolded, dgate


def _conv_forward(conv: Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a convolution to ``x`` with the given weights and without its norm."""
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _convolve(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    # Compute in the dtype of the feature maps, regardless of autocast.
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, shift.to(x.dtype))


def _conv_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, learns: bool
) -> tuple[Tensor | None, Tensor]:
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [learns, True, False]
    )
    return found[0], found[1]


def _inferred_sum(conv: Conv2d, se: SqueezeExcitation, x: Tensor, shortcut: Tensor) -> Tensor:
    gate = _spread(se.excite(mean_of_maps(x))) if se.takes_input else None
    # For a large feature map, scaling the weights costs less than applying the norm.
    if conv.norm is not None and x.shape[2] * x.shape[3] > x.shape[1] // conv.groups:
        scale, shift = _fold(conv.norm)
        weight = _folded(conv.weight, scale, x.dtype)
        out = _conv_forward(conv, x, weight, shift.to(x.dtype))
    else:
        out = conv(x)
    return torch.addcmul(shortcut, out, se.gate(out) if gate is None else gate, out=out)


def _folded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale[:, None, None, None]).to(dtype)


def _spread(values: Tensor, like: Tensor | None = None) -> Tensor:
    """Reshape values from ``(N, C)`` to ``(N, C, 1, 1)``."""
    values = values[:, :, None, None]
    return values if like is None else values.to(like.dtype)


def _layout(x: Tensor) -> torch.memory_format:
    flat = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if flat else torch.channels_last
