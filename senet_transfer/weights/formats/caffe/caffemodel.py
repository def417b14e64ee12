"""Reader for ``.caffemodel`` files that does not require Caffe."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown
from senet_transfer.weights.formats.caffe.layers import PARAMETERS, CaffeLayer
from senet_transfer.weights.formats.caffe.schema import V1_TYPES, NetParameter

# Maximum size of a protobuf message.
_MAX_BYTES = 2**31 - 1
_MAX_DIMENSIONS = 32  # Caffe's kMaxBlobAxes


def read_caffemodel(path: str | Path) -> tuple[str, list[CaffeLayer]]:
    """Read a ``.caffemodel`` file in the current format or the 2014 format (``layers``).

    Returns:
        The network's name, and its layers in file order.

    Raises:
        UserError: If the file is not a Caffe network, is damaged, or has the 2013 format.
    """
    try:
        return _read(Path(path))
    except (DecodeError, ValueError) as error:
        raise UserError(
            f"{path} is not a weight file in a known format (torch.save, safetensors, pickle), and "
            f"can't be read as a .caffemodel: {shown(error)}. Check the file, or download it again."
        ) from error


def _read(path: Path) -> tuple[str, list[CaffeLayer]]:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError("it is larger than 2 GiB, the limit of protobuf")
    net = NetParameter.FromString(path.read_bytes())
    layers = [_layer(layer, layer.type) for layer in net.layer]
    for layer in net.layers:
        if layer.HasField("layer"):
            raise UserError(
                f"{path} is a Caffe file in the unsupported 2013 format. Convert it to the current "
                "format with Caffe's upgrade_net_proto_binary."
            )
        layers.append(_layer(layer, V1_TYPES.get(layer.type, f"V1 type {layer.type}")))
    # Unknown fields are common in layers. At the top level, they show that the file is not a Caffe
    # file.
    net.ClearField("layer")
    net.ClearField("layers")
    size = net.ByteSize()
    net.DiscardUnknownFields()
    if net.ByteSize() != size:
        raise ValueError("it contains fields that are not part of a Caffe network")
    return net.name, layers


def _layer(message: Any, kind: str) -> CaffeLayer:
    """Convert a ``LayerParameter`` or ``V1LayerParameter`` message to a :class:`CaffeLayer`."""
    params = {
        field.name: {f.name: _plain(value) for f, value in param.ListFields()}
        for field, param in message.ListFields()
        if field.name in PARAMETERS
    }
    return CaffeLayer(
        name=message.name,
        type=kind,
        bottoms=tuple(message.bottom),
        tops=tuple(message.top),
        blobs=tuple(_blob(blob) for blob in message.blobs),
        params=params,
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else list(value)


def _blob(message: Any) -> np.ndarray:
    """Convert a blob to a float32 array with the shape stored in the file."""
    values = np.asarray(message.double_data or message.data, dtype=np.float32)
    if message.HasField("shape"):
        shape = tuple(message.shape.dim)
    else:
        dims = ("num", "channels", "height", "width")
        legacy = any(message.HasField(dim) for dim in dims)
        shape = tuple(getattr(message, dim) for dim in dims) if legacy else values.shape
    if len(shape) > _MAX_DIMENSIONS or any(n < 0 for n in shape):
        raise ValueError(f"a blob has the invalid shape {shape}")
    if int(np.prod(shape, dtype=object)) != values.size:
        raise ValueError(f"a blob has {values.size} values, which do not match its shape {shape}")
    return values.reshape(shape)


class _MismatchError(ValueError):
    """Error for blobs that do not match the type and parameters of their layer."""


def caffe_tensors(
    layers: Iterable[CaffeLayer], path: str | Path = "Caffe network"
) -> dict[str, torch.Tensor]:
    """Return the tensors of a Caffe network, with names such as ``conv1/weight``.

    The names are ``{layer}/weight`` and ``/bias`` for Convolution, Deconvolution, InnerProduct and
    Scale; ``{layer}/running_mean`` and ``/running_var`` for BatchNorm, whose stored sums are
    divided by the factor in the third blob; and ``{layer}/blob0`` etc. for any other layer type
    with blobs. Weights have PyTorch's shapes; biases and statistics are one-dimensional.

    Args:
        layers: Layers returned by :func:`read_caffemodel`. The tensors may share memory with them.
        path: Path of the file, for error messages.

    Raises:
        UserError: If the blobs of a layer contradict its type or parameters.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        try:
            roles = _roles(layer)
        except _MismatchError as error:
            raise UserError(f"{path}: {error}") from error
        for role, values in roles:
            name = f"{layer.name}/{role}"
            if name in tensors:
                raise UserError(
                    f"{path} contains two layers named {shown(layer.name)!r} with blobs. The file "
                    "is damaged. Download it again."
                )
            tensors[name] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return tensors


def _roles(layer: CaffeLayer) -> list[tuple[str, np.ndarray]]:
    blobs = layer.blobs
    if not blobs:
        return []
    if layer.type == "BatchNorm":
        return _batch_norm(layer)
    if layer.type not in ("Convolution", "Deconvolution", "InnerProduct", "Scale"):
        return [(f"blob{i}", blob) for i, blob in enumerate(blobs)]
    if len(blobs) > 2:
        raise _mismatch(layer, "a weight and an optional bias")
    weight = _weight(layer)
    roles = [("weight", weight)]
    if len(blobs) == 2:
        bias = blobs[1].reshape(-1)
        outputs = weight.shape[1 if layer.type == "Deconvolution" else 0]
        if layer.type != "Deconvolution" and bias.size != outputs:
            raise _mismatch(layer, f"a bias of {outputs} values")
        roles.append(("bias", bias))
    return roles


def _weight(layer: CaffeLayer) -> np.ndarray:
    weight = layer.blobs[0]
    if layer.type == "Scale":
        return weight.reshape(-1)
    if layer.type == "InnerProduct":
        params = layer.params.get("inner_product_param", {})
        if weight.ndim < 2:
            raise _mismatch(layer, "a matrix")
        # Old files store all blobs with four dimensions: (1, 1, outputs, inputs).
        weight = weight.reshape(weight.shape[-2:])
        if params.get("transpose", False):
            weight = weight.T
    else:
        params = layer.params.get("convolution_param", {})
        if weight.ndim != 4:
            raise _mismatch(layer, "a four-dimensional weight")
        sizes = params.get("kernel_size", [])
        if sizes and weight.shape[2:] != (sizes[0], sizes[-1]):
            raise _mismatch(layer, f"a kernel of size {sizes}")
    outputs = params.get("num_output", weight.shape[0])
    if layer.type != "Deconvolution" and weight.shape[0] != outputs:
        raise _mismatch(layer, f"{outputs} outputs")
    return weight


def _batch_norm(layer: CaffeLayer) -> list[tuple[str, np.ndarray]]:
    if len(layer.blobs) != 3 or layer.blobs[2].size != 1:
        raise _mismatch(layer, "a mean, a variance and their scale factor")
    mean, variance = (blob.reshape(-1) for blob in layer.blobs[:2])
    if mean.shape != variance.shape:
        raise _mismatch(layer, "a mean and a variance of the same length")
    factor = layer.blobs[2].reshape(())
    # As in Caffe, a layer that was never trained has the factor 0, and its statistics are 0.
    scale = np.float32(0 if factor == 0 else 1 / factor)
    return [("running_mean", mean * scale), ("running_var", variance * scale)]


def _mismatch(layer: CaffeLayer, expected: str) -> _MismatchError:
    found = ", ".join(str(tuple(blob.shape)) for blob in layer.blobs)
    return _MismatchError(
        f"Layer {shown(layer.name)!r} ({shown(layer.type)}) has blobs of shape {found}; expected "
        f"{expected}. The file is damaged, or was written by an unknown fork of Caffe. Use "
        "different weights."
    )
