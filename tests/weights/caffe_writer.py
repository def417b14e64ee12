"""Writer of Caffe files for the tests, which encodes Caffe's protobuf messages.

It shares no code with the reader under test. Field numbers and types are therefore repeated here.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

# Messages map field names to (number, kind). A kind is i (int), b (bool), f (float), s (string),
# the names of an enumeration, or a nested message.
_FILLER = {"type": (1, "s"), "value": (2, "f")}
_SHAPE = {"dim": (1, "i")}
_MESSAGES: dict[str, tuple[int, int | None, dict[str, tuple[int, Any]]]] = {
    # name: (number in LayerParameter, number in V1LayerParameter, fields)
    "convolution_param": (
        106,
        10,
        {
            "num_output": (1, "i"),
            "bias_term": (2, "b"),
            "pad": (3, "i"),
            "kernel_size": (4, "i"),
            "group": (5, "i"),
            "stride": (6, "i"),
            "weight_filler": (7, _FILLER),
            "pad_h": (9, "i"),
            "pad_w": (10, "i"),
            "kernel_h": (11, "i"),
            "kernel_w": (12, "i"),
            "stride_h": (13, "i"),
            "stride_w": (14, "i"),
            "dilation": (18, "i"),
        },
    ),
    "pooling_param": (
        121,
        19,
        {
            "pool": (1, ["MAX", "AVE", "STOCHASTIC"]),
            "kernel_size": (2, "i"),
            "stride": (3, "i"),
            "pad": (4, "i"),
            "global_pooling": (12, "b"),
        },
    ),
    "batch_norm_param": (
        139,
        None,
        {"use_global_stats": (1, "b"), "moving_average_fraction": (2, "f"), "eps": (3, "f")},
    ),
    "scale_param": (142, None, {"axis": (1, "i"), "num_axes": (2, "i"), "bias_term": (4, "b")}),
    "inner_product_param": (
        117,
        17,
        {"num_output": (1, "i"), "bias_term": (2, "b"), "transpose": (6, "b")},
    ),
    "concat_param": (104, 9, {"axis": (2, "i")}),
    "dropout_param": (108, 12, {"dropout_ratio": (1, "f")}),
    "eltwise_param": (110, 24, {"operation": (1, ["PROD", "SUM", "MAX"]), "coeff": (2, "f")}),
    "reshape_param": (133, None, {"shape": (1, _SHAPE), "axis": (2, "i")}),
    "input_param": (143, None, {"shape": (1, _SHAPE)}),
}
_V1_TYPES = {
    "Concat": 3,
    "Convolution": 4,
    "Dropout": 6,
    "Eltwise": 25,
    "InnerProduct": 14,
    "Pooling": 17,
    "ReLU": 18,
    "Sigmoid": 19,
    "Softmax": 20,
}


class CaffeNet:
    """Caffe network that is built layer by layer.

    Methods that add a layer return the name of its output. Arrays have PyTorch's shapes and are
    converted to float32. ``batch_norm``, ``scale`` and ``relu`` work in place, as in the published
    definitions.

    Args:
        name: Name of the network.
        shape: Shape of the input, (N, C, H, W).
        data: Name of the input.
    """

    def __init__(self, name: str, shape: tuple[int, ...] = (1, 3, 224, 224), data: str = "data"):
        self.name = name
        self.shape = shape
        self.data = data
        self.layers: list[dict[str, Any]] = []

    def layer(
        self, kind: str, name: str, bottoms: list[str], top: str, blobs: Any = (), **params: Any
    ) -> str:
        """Add a layer of any type, with parameter messages such as ``scale_param={"axis": 0}``."""
        arrays = [np.ascontiguousarray(blob, dtype=np.float32) for blob in blobs]
        self.layers.append(
            {"type": kind, "name": name, "bottoms": bottoms, "top": top}
            | {"blobs": arrays, "params": params}
        )
        return top

    def conv(
        self,
        name: str,
        bottom: str,
        weight: Any,
        bias: Any = None,
        *,
        stride: int = 1,
        pad: int = 0,
        group: int = 1,
        top: str | None = None,
    ) -> str:
        """Add a convolution with a weight of shape (out, in / group, kernel, kernel)."""
        params = {"num_output": weight.shape[0], "kernel_size": weight.shape[2], "stride": stride}
        params |= {"pad": pad} if pad else {}
        params |= {"group": group} if group != 1 else {}
        params |= {"bias_term": False} if bias is None else {}
        blobs = [weight] if bias is None else [weight, bias]
        out = name if top is None else top
        return self.layer("Convolution", name, [bottom], out, blobs, convolution_param=params)

    def batch_norm(
        self,
        name: str,
        bottom: str,
        mean: Any,
        var: Any,
        factor: float = 1.0,
        eps: float | None = None,
    ) -> str:
        """Add the statistics of a batch norm, which Caffe stores multiplied by ``factor``."""
        params: dict[str, Any] = {"use_global_stats": True}
        params |= {} if eps is None else {"eps": eps}
        blobs = [np.asarray(mean) * factor, np.asarray(var) * factor, np.array([factor])]
        return self.layer("BatchNorm", name, [bottom], bottom, blobs, batch_norm_param=params)

    def scale(self, name: str, bottom: str, weight: Any, bias: Any) -> str:
        """Add a Scale layer, which contains the weight and bias of a batch norm in Caffe."""
        params = {"bias_term": True}
        return self.layer("Scale", name, [bottom], bottom, [weight, bias], scale_param=params)

    def conv_bn(
        self,
        name: str,
        bottom: str,
        weight: Any,
        bn: dict[str, Any],
        *,
        relu: str | None = None,
        factor: float = 1.0,
        **geometry: Any,
    ) -> str:
        """Add a convolution, batch norm and optional ReLU, named as in the SENet authors' files.

        Args:
            name: Name of the convolution. The norm's layers are called ``name/bn`` and
                ``name/bn/scale``.
            bottom: Input of the convolution.
            weight: Weight of the convolution, which has no bias.
            bn: ``weight``, ``bias``, ``running_mean`` and ``running_var`` of the norm.
            relu: Name of the ReLU. If None, no ReLU is added.
            factor: See :meth:`batch_norm`.
            **geometry: Options of :meth:`conv`.
        """
        top = self.conv(name, bottom, weight, **geometry)
        self.batch_norm(f"{name}/bn", top, bn["running_mean"], bn["running_var"], factor)
        self.scale(f"{name}/bn/scale", top, bn["weight"], bn["bias"])
        return top if relu is None else self.relu(relu, top)

    def relu(self, name: str, bottom: str) -> str:
        """Add an in-place ReLU."""
        return self.layer("ReLU", name, [bottom], bottom)

    def sigmoid(self, name: str, bottom: str) -> str:
        """Add an in-place sigmoid."""
        return self.layer("Sigmoid", name, [bottom], bottom)

    def pool(
        self, name: str, bottom: str, kernel: int, stride: int, pad: int = 0, method: str = "MAX"
    ) -> str:
        """Add a pooling layer, whose output size Caffe rounds up."""
        params = {"pool": method, "kernel_size": kernel, "stride": stride}
        params |= {"pad": pad} if pad else {}
        return self.layer("Pooling", name, [bottom], name, pooling_param=params)

    def global_pool(self, name: str, bottom: str) -> str:
        """Add a global average pooling layer."""
        params = {"pool": "AVE", "global_pooling": True}
        return self.layer("Pooling", name, [bottom], name, pooling_param=params)

    def fc(self, name: str, bottom: str, weight: Any, bias: Any = None) -> str:
        """Add a fully connected (InnerProduct) layer with a weight of shape (out, in)."""
        params: dict[str, Any] = {"num_output": weight.shape[0]}
        params |= {"bias_term": False} if bias is None else {}
        blobs = [weight] if bias is None else [weight, bias]
        return self.layer("InnerProduct", name, [bottom], name, blobs, inner_product_param=params)

    def axpy(self, name: str, gate: str, residual: str, shortcut: str) -> str:
        """Add the SENet authors' Axpy layer: gate * residual + shortcut."""
        return self.layer("Axpy", name, [gate, residual, shortcut], name)

    def add(self, name: str, *bottoms: str) -> str:
        """Add a layer that computes the elementwise sum of its inputs."""
        return self.layer("Eltwise", name, list(bottoms), name, eltwise_param={"operation": "SUM"})

    def concat(self, name: str, *bottoms: str) -> str:
        """Add a layer that concatenates the channels of its inputs."""
        return self.layer("Concat", name, list(bottoms), name)

    def dropout(self, name: str, bottom: str, ratio: float) -> str:
        """Add an in-place dropout layer, which has no effect at test time."""
        return self.layer("Dropout", name, [bottom], bottom, dropout_param={"dropout_ratio": ratio})

    def softmax(self, name: str, bottom: str) -> str:
        """Add a softmax over the channels."""
        return self.layer("Softmax", name, [bottom], name)

    def gate_channels(self, name: str, bottom: str, gate: str) -> str:
        """Add SE-BN-Inception's layers that apply a gate: Reshape to (N, C), Scale along axis 0."""
        flat = self.layer(
            "Reshape",
            f"{name}_prob_reshape",
            [gate],
            f"{name}_prob_reshape",
            reshape_param={"shape": {"dim": [0, 0]}},
        )
        params = {"axis": 0, "bias_term": False}
        return self.layer(
            "Scale", f"{name}_scale", [bottom, flat], f"{name}/output", scale_param=params
        )

    def write(self, prototxt: Path, caffemodel: Path, *, for_opencv: bool = False) -> None:
        """Write the definition and the weights to files.

        Args:
            prototxt: Path of the definition.
            caffemodel: Path of the weights.
            for_opencv: Whether to swap the last two inputs of each Axpy layer in the definition.
                OpenCV applies the gate to the third input, whereas the authors' layer applies it
                to the second. (OpenCV's Axpy also supports only one image per batch.)
        """
        Path(prototxt).write_text(self.prototxt(for_opencv=for_opencv))
        Path(caffemodel).write_bytes(self.caffemodel())

    def prototxt(self, *, for_opencv: bool = False) -> str:
        """Return the network's definition in the current prototxt format."""
        dims = {"shape": {"dim": list(self.shape)}}
        lines = [f'name: "{self.name}"', "layer {", f'  name: "{self.data}"', '  type: "Input"']
        lines += [f'  top: "{self.data}"', *_text("input_param", dims, "  "), "}"]
        for layer in self.layers:
            bottoms = layer["bottoms"]
            if for_opencv and layer["type"] == "Axpy":
                bottoms = [bottoms[0], bottoms[2], bottoms[1]]
            lines += ["layer {", f'  name: "{layer["name"]}"', f'  type: "{layer["type"]}"']
            lines += [*(f'  bottom: "{bottom}"' for bottom in bottoms), f'  top: "{layer["top"]}"']
            for name, params in layer["params"].items():
                lines += _text(name, params, "  ")
            lines.append("}")
        return "\n".join(lines) + "\n"

    def caffemodel(
        self, *, legacy_shapes: bool = False, doubles: bool = False, packed: bool = True
    ) -> bytes:
        """Return the weights and layer parameters in the current caffemodel format.

        Args:
            legacy_shapes: Whether to store four-dimensional shapes (num, channels, height, width).
            doubles: Whether to store values in double precision.
            packed: Whether to store each array as a packed field, as Caffe does.
        """
        out = bytearray(_bytes(1, self.name.encode()))
        for layer in self.layers:
            body = _bytes(1, layer["name"].encode()) + _bytes(2, layer["type"].encode())
            body += b"".join(_bytes(3, bottom.encode()) for bottom in layer["bottoms"])
            body += _bytes(4, layer["top"].encode())
            for blob in layer["blobs"]:
                body += _bytes(7, _blob(blob, legacy_shapes, doubles, packed))
            body += _varint(10 << 3) + _varint(1)  # phase: TEST
            for name, params in layer["params"].items():
                number, _, fields = _MESSAGES[name]
                body += _bytes(number, _message(fields, params))
            out += _bytes(100, body)
        return bytes(out)

    def v1_caffemodel(self) -> bytes:
        """Return the weights in the 2014 format, with V1LayerParameter and without BatchNorm."""
        out = bytearray(_bytes(1, self.name.encode()))
        for layer in self.layers:
            body = b"".join(_bytes(2, bottom.encode()) for bottom in layer["bottoms"])
            body += _bytes(3, layer["top"].encode()) + _bytes(4, layer["name"].encode())
            body += _varint(5 << 3) + _varint(_V1_TYPES[layer["type"]])
            body += b"".join(_bytes(6, _blob(blob, True, False, True)) for blob in layer["blobs"])
            body += b"".join(_varint(7 << 3 | 5) + struct.pack("<f", 1) for _ in layer["blobs"])
            for name, params in layer["params"].items():
                _, number, fields = _MESSAGES[name]
                body += _bytes(number, _message(fields, params))
            out += _bytes(2, body)
        return bytes(out)


def _text(name: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, dict):
        inner = [line for k, v in value.items() for line in _text(k, v, indent + "  ")]
        return [f"{indent}{name} {{", *inner, f"{indent}}}"]
    if isinstance(value, list):
        return [line for item in value for line in _text(name, item, indent)]
    if isinstance(value, bool):
        return [f"{indent}{name}: {str(value).lower()}"]
    return [f"{indent}{name}: {value}"]


def _message(fields: dict[str, tuple[int, Any]], params: dict[str, Any]) -> bytes:
    out = b""
    for name, value in params.items():
        number, kind = fields[name]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(kind, dict):
                out += _bytes(number, _message(kind, item))
            elif kind == "f":
                out += _varint(number << 3 | 5) + struct.pack("<f", item)
            elif kind == "s":
                out += _bytes(number, item.encode())
            else:
                plain = kind.index(item) if isinstance(kind, list) else int(item)
                out += _varint(number << 3) + _varint(plain)
    return out


def _blob(array: np.ndarray, legacy_shape: bool, doubles: bool, packed: bool) -> bytes:
    number, dtype, wire = (8, "<f8", 1) if doubles else (5, "<f4", 5)
    raw = array.astype(dtype).tobytes()
    if packed:
        data = _bytes(number, raw)
    else:
        size = np.dtype(dtype).itemsize
        tag = _varint(number << 3 | wire)
        data = b"".join(tag + raw[i : i + size] for i in range(0, len(raw), size))
    if legacy_shape:
        dims = (1,) * (4 - array.ndim) + array.shape
        return b"".join(_varint(i << 3) + _varint(n) for i, n in enumerate(dims, 1)) + data
    return data + _bytes(7, _bytes(1, b"".join(_varint(n) for n in array.shape)))


def _bytes(number: int, raw: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
