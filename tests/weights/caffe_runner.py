"""Execution of Caffe networks in plain PyTorch, from the layers returned by this project's reader.

Each operation follows Caffe's documentation of the layer, not this project's modules.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from senet_transfer.weights.formats.caffe.layers import CaffeLayer, window_of


def run_caffe(
    layers: Iterable[CaffeLayer], tensors: dict[str, torch.Tensor], image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Run a Caffe network and return its blobs (feature maps), keyed by name.

    A blob that in-place layers modify contains the output of the last such layer.

    Args:
        layers: Layers of a caffemodel.
        tensors: Tensors returned by ``caffe_tensors``.
        image: Input of the network, (N, C, H, W).
    """
    blobs: dict[str, torch.Tensor] = {}
    for layer in layers:
        inputs = [blobs.setdefault(name, image) for name in layer.bottoms]
        own = {
            name.removeprefix(f"{layer.name}/"): tensor
            for name, tensor in tensors.items()
            if name.rpartition("/")[0] == layer.name
        }
        blobs[layer.tops[0]] = _run(layer, inputs, own)
    return blobs


def _run(
    layer: CaffeLayer, inputs: list[torch.Tensor], own: dict[str, torch.Tensor]
) -> torch.Tensor:
    x = inputs[0]
    if layer.type == "Convolution":
        window = window_of(layer)
        return F.conv2d(
            x,
            own["weight"],
            own.get("bias"),
            window.stride,
            window.pad,
            window.dilation,
            window.group,
        )
    if layer.type == "BatchNorm":
        return F.batch_norm(x, own["running_mean"], own["running_var"], eps=layer.eps)
    if layer.type == "Scale":
        if len(inputs) == 2:
            return x * inputs[1][:, :, None, None]
        return x * own["weight"][:, None, None] + own["bias"][:, None, None]
    if layer.type == "Pooling":
        return _pool(layer, x)
    if layer.type == "InnerProduct":
        return F.linear(x.flatten(1), own["weight"], own.get("bias"))
    if layer.type == "Axpy":
        return inputs[0] * inputs[1] + inputs[2]
    simple = {
        "ReLU": F.relu,
        "Sigmoid": torch.sigmoid,
        "Softmax": lambda y: y.softmax(1),
        "Dropout": lambda y: y,
        "Reshape": lambda y: y.flatten(1),
    }
    if layer.type in simple:
        return simple[layer.type](x)
    return torch.cat(inputs, 1) if layer.type == "Concat" else sum(inputs[1:], x)


def _pool(layer: CaffeLayer, x: torch.Tensor) -> torch.Tensor:
    window = window_of(layer)
    if window.is_global:
        return x.mean((2, 3), keepdim=True)
    if window.method == "MAX":
        return F.max_pool2d(x, window.kernel, window.stride, window.pad, ceil_mode=window.ceil)
    return F.avg_pool2d(x, window.kernel, window.stride, window.pad, ceil_mode=window.ceil)
