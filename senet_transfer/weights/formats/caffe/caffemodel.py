"""Reading Caffe's ``.caffemodel`` without Caffe: the protobuf wire format, over plain bytes.

The numbers of a layer are views of the file's bytes: SENet-154's 440 MB are read in about the time
that the disk takes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown
from senet_transfer.weights.formats.caffe.layers import CaffeLayer
from senet_transfer.weights.formats.caffe.schema import (
    LAYER,
    SHAPE,
    V1_LAYER,
    V1_TYPES,
    Field,
    Schema,
)
from senet_transfer.weights.formats.caffe.wire import BYTES, FIXED32, FIXED64, VARINT, Message

_V1_NAMES = {number: name for number, _, name in V1_TYPES}
# Fields of NetParameter besides its layers: name, layers (V1), input, input_dim, force_backward,
# state, debug_info, input_shape. Anything else at the top is another kind of file.
_NET_FIELDS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 100})


def read_caffemodel(path: str | Path) -> tuple[str, list[CaffeLayer]]:
    """Reads a ``.caffemodel``: today's format, and that of 2014 (``layers``).

    Returns:
        The network's name and its layers in the file's order.

    Raises:
        UserError: the file is of before 2014, which Caffe's own tool upgrades.
        ValueError: the bytes are not a network, or are damaged.
    """
    name, layers = "", []
    for number, wire_type, value in Message(Path(path).read_bytes()).fields():
        if number not in _NET_FIELDS:
            raise ValueError(f"field {number} at the top, which no Caffe network has")
        if number == 1:
            name = _expect(value, wire_type, BYTES).text()
        elif number == 100:
            layers.append(_layer(_expect(value, wire_type, BYTES)))
        elif number == 2:
            layers.append(_v1_layer(_expect(value, wire_type, BYTES), path))
    return name, layers


def _layer(message: Message) -> CaffeLayer:
    parts: dict[int, list[Any]] = {1: [], 2: [], 3: [], 4: [], 7: []}
    params: dict[str, Any] = {}
    for number, wire_type, value in message.fields():
        if number in parts:
            value = _expect(value, wire_type, BYTES)
            parts[number].append(_blob(value) if number == 7 else value.text())
        elif number in LAYER:
            _set(params, LAYER[number], _decode(LAYER[number], wire_type, value))
    return CaffeLayer(
        name=parts[1][-1] if parts[1] else "",
        type=parts[2][-1] if parts[2] else "",
        bottoms=tuple(parts[3]),
        tops=tuple(parts[4]),
        blobs=tuple(parts[7]),
        params=params,
    )


def _v1_layer(message: Message, path: str | Path) -> CaffeLayer:
    parts: dict[int, list[Any]] = {2: [], 3: [], 4: [], 6: []}
    params: dict[str, Any] = {}
    kind = ""
    for number, wire_type, value in message.fields():
        if number == 1:
            raise UserError(
                f"{path}: a Caffe file of 2013. Caffe's upgrade_net_proto_binary makes a current "
                "one of it."
            )
        if number in parts:
            value = _expect(value, wire_type, BYTES)
            parts[number].append(_blob(value) if number == 6 else value.text())
        elif number == 5:
            value = _expect(value, wire_type, VARINT)
            kind = _V1_NAMES.get(value, f"V1 type {value}")
        elif number in V1_LAYER:
            _set(params, V1_LAYER[number], _decode(V1_LAYER[number], wire_type, value))
    name = parts[4][-1] if parts[4] else ""
    return CaffeLayer(name, kind, tuple(parts[2]), tuple(parts[3]), tuple(parts[6]), params=params)


def _expect(value: Any, wire_type: int, expected: int) -> Any:
    if wire_type != expected:
        raise ValueError(f"a field of wire type {wire_type} where {expected} is expected")
    return value


def _set(params: dict[str, Any], field: Field, value: Any) -> None:
    if field.repeated:
        params.setdefault(field.name, []).extend(value if isinstance(value, list) else [value])
    elif isinstance(value, dict):  # protobuf merges a message that is stated in parts
        params.setdefault(field.name, {}).update(value)
    else:
        params[field.name] = value


def _decode(field: Field, wire_type: int, value: Any) -> Any:
    """The value of a parameter; a list where a repeated one is packed."""
    if isinstance(field.kind, dict):
        return _decode_message(field.kind, _expect(value, wire_type, BYTES))
    if field.kind is float:
        if field.repeated and wire_type == BYTES:
            return [_shortest(number) for number in value.numbers("<f4")]
        return _shortest(_expect(value, wire_type, FIXED32).numbers("<f4")[0])
    if field.repeated and wire_type == BYTES:
        return [_integer(field, number) for number in value.varints()]
    return _integer(field, _expect(value, wire_type, VARINT))


def _decode_message(schema: Schema, message: Message) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for number, wire_type, value in message.fields():
        if number in schema:
            _set(params, schema[number], _decode(schema[number], wire_type, value))
    return params


def _shortest(number: np.float32) -> float:
    # float32's 1e-5 is 9.99999974e-06 in float64; what its author wrote is meant.
    return float(str(number))


def _integer(field: Field, value: int) -> Any:
    if field.kind is bool:
        return bool(value)
    if isinstance(field.kind, tuple):
        return field.kind[value]
    return value - 2**64 if value >= 2**63 else value


def _blob(message: Message) -> np.ndarray:
    """A layer's numbers as float32, in their shape."""
    legacy: dict[int, int] = {}
    shape: tuple[int, ...] | None = None
    floats: list[np.ndarray] = []
    for number, wire_type, value in message.fields():
        if number == 5 and wire_type in (BYTES, FIXED32):
            floats.append(value.numbers("<f4"))
        elif number == 8 and wire_type in (BYTES, FIXED64):
            floats.append(value.numbers("<f8").astype(np.float32))
        elif number == 7:
            dims = _decode_message(SHAPE, _expect(value, wire_type, BYTES))
            shape = tuple(dims.get("dim", []))
        elif number in (1, 2, 3, 4):
            legacy[number] = _expect(value, wire_type, VARINT)
    values = floats[0] if len(floats) == 1 else np.concatenate([np.empty(0, "<f4"), *floats])
    if shape is None:
        shape = tuple(legacy.get(i, 0) for i in (1, 2, 3, 4)) if legacy else values.shape
    if any(n < 0 for n in shape) or len(shape) > 32:
        raise ValueError(f"numbers of shape {shape}")
    if int(np.prod(shape, dtype=object)) != values.size:
        raise ValueError(f"{values.size} numbers for a shape of {shape}")
    return values.reshape(shape)


class _UnlikeError(ValueError):
    """A layer's numbers are not those of its type and parameters."""


def caffe_tensors(
    layers: Iterable[CaffeLayer], path: str | Path = "Caffe network"
) -> dict[str, torch.Tensor]:
    """The tensors of a network, named by layer and role.

    ``{layer}/weight`` and ``/bias`` for Convolution, Deconvolution, InnerProduct and Scale;
    ``{layer}/running_mean`` and ``/running_var`` for BatchNorm, whose two sums are divided by the
    factor it keeps as its third blob; ``{layer}/blob0`` and so on for any other type with numbers.
    Weights have PyTorch's shapes; biases and statistics have one dimension.

    Args:
        layers: of :func:`read_caffemodel`.
        path: for error messages.

    Raises:
        UserError: a layer has other blobs than its type and parameters say.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        try:
            roles = _roles(layer)
        except _UnlikeError as error:
            raise UserError(f"{path}: {error}") from error
        for role, values in roles:
            name = f"{layer.name}/{role}"
            if name in tensors:
                raise UserError(
                    f"{path}: layer {shown(layer.name)!r} is there twice, with numbers."
                )
            # A copy of its own: aligned, writable, and not keeping the whole file in memory.
            tensors[name] = torch.from_numpy(np.array(values, dtype=np.float32, copy=True))
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
        raise _unlike(layer, "a weight and perhaps a bias")
    weight = _weight(layer)
    roles = [("weight", weight)]
    if len(blobs) == 2:
        bias = blobs[1].reshape(-1)
        outputs = weight.shape[1 if layer.type == "Deconvolution" else 0]
        if layer.type != "Deconvolution" and bias.size != outputs:
            raise _unlike(layer, f"a bias of {outputs} numbers")
        roles.append(("bias", bias))
    return roles


def _weight(layer: CaffeLayer) -> np.ndarray:
    weight = layer.blobs[0]
    if layer.type == "Scale":
        return weight.reshape(-1)
    if layer.type == "InnerProduct":
        params = layer.params.get("inner_product_param", {})
        if weight.ndim < 2:
            raise _unlike(layer, "a matrix")
        # Old files state every blob in four dimensions: (1, 1, outputs, inputs).
        weight = weight.reshape(weight.shape[-2:])
        if params.get("transpose", False):
            weight = weight.T
    else:
        params = layer.params.get("convolution_param", {})
        if weight.ndim != 4:
            raise _unlike(layer, "a weight of four dimensions")
        sizes = params.get("kernel_size", [])
        if sizes and weight.shape[2:] != (sizes[0], sizes[-1]):
            raise _unlike(layer, f"a kernel of {sizes}")
    outputs = params.get("num_output", weight.shape[0])
    if layer.type != "Deconvolution" and weight.shape[0] != outputs:
        raise _unlike(layer, f"{outputs} outputs")
    return weight


def _batch_norm(layer: CaffeLayer) -> list[tuple[str, np.ndarray]]:
    if len(layer.blobs) != 3 or layer.blobs[2].size != 1:
        raise _unlike(layer, "a mean, a variance and the factor of both")
    mean, variance = (blob.reshape(-1) for blob in layer.blobs[:2])
    if mean.shape != variance.shape:
        raise _unlike(layer, "a mean and a variance of one length")
    factor = layer.blobs[2].reshape(())
    # Caffe's rule: a layer that has seen no image has factor 0, and statistics of 0.
    scale = np.float32(0 if factor == 0 else 1 / factor)
    return [("running_mean", mean * scale), ("running_var", variance * scale)]


def _unlike(layer: CaffeLayer, expected: str) -> _UnlikeError:
    found = ", ".join(str(tuple(blob.shape)) for blob in layer.blobs)
    return _UnlikeError(
        f"layer {shown(layer.name)!r} ({shown(layer.type)}) has numbers of shape {found}, where "
        f"{expected} is expected. The file is damaged, or of an unknown fork of Caffe."
    )
