"""Data classes for the layers of Caffe networks, and for their kernel size, stride and padding."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from senet_transfer.errors import UserError

# Fields of a layer message that are stored in `CaffeLayer.params`.
PARAMETERS = ("convolution_param", "inner_product_param", "pooling_param", "batch_norm_param")
# Caffe's default for BatchNormParameter.eps.
DEFAULT_EPS = 1e-5

_CEIL = 0  # PoolingParameter.RoundMode.CEIL
_METHODS = ("MAX", "AVE", "STOCHASTIC")  # PoolingParameter.PoolMethod


@dataclass(frozen=True)
class CaffeLayer:
    """Layer of a Caffe network.

    Attributes:
        name: Layer name, such as ``conv2_1_1x1_reduce/bn``.
        type: Layer type in the current format, such as ``Convolution``.
        bottoms: Names of the inputs.
        tops: Names of the outputs.
        blobs: Weights and statistics, as float32 arrays.
        params: Layer parameters that are set in the file, such as
            ``{"convolution_param": {"num_output": 64, "kernel_size": [3]}}``. Repeated fields are
            lists, and enumerations are integers. Defaults are not filled in. See
            :data:`PARAMETERS`.
    """

    name: str
    type: str
    bottoms: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    blobs: tuple[np.ndarray, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        """Return the eps of a BatchNorm layer, which is added to the variance."""
        eps = self.params.get("batch_norm_param", {}).get("eps", DEFAULT_EPS)
        # Use the shortest decimal form of the float32 value: 1e-5 instead of 9.99999974e-06.
        return float(str(np.float32(eps)))


@dataclass(frozen=True)
class Window:
    """Kernel size, stride, padding etc. of a Convolution or Pooling layer, including defaults.

    Attributes:
        kernel: Kernel size (height, width) in pixels; (0, 0) for global pooling.
        stride: Stride (vertical, horizontal) in pixels.
        pad: Padding (vertical, horizontal) in pixels on each side.
        dilation: Dilation (vertical, horizontal); 1 for an ordinary convolution.
        group: Number of groups of a convolution.
        ceil: Whether pooling rounds its output size up, as Caffe does by default.
        is_global: Whether pooling covers the whole feature map.
        method: Pooling method: "MAX", "AVE" or "STOCHASTIC"; empty for a convolution.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    group: int = 1
    ceil: bool = False
    is_global: bool = False
    method: str = ""


def window_of(layer: CaffeLayer) -> Window:
    """Return the kernel size, stride, padding etc. of a Convolution or Pooling layer.

    Raises:
        UserError: If the layer has a different type or invalid values, or the file does not specify
            these values because it contains only blobs.
    """
    key = {"Convolution": "convolution_param", "Pooling": "pooling_param"}.get(layer.type)
    if key is None or key not in layer.params:
        raise UserError(
            f"Caffe layer {layer.name!r} ({layer.type}) has no kernel size, stride or padding; "
            "expected these layer parameters in addition to the weights. Use a .caffemodel file "
            "that contains the parameters from the network's .prototxt file."
        )
    params = layer.params[key]
    pooling = layer.type == "Pooling"
    return Window(
        kernel=_pair(layer, params, "kernel_size", "kernel", 0),
        stride=_pair(layer, params, "stride", "stride", 1),
        pad=_pair(layer, params, "pad", "pad", 0),
        dilation=_pair(layer, params, "dilation", None, 1),
        group=params.get("group", 1),
        ceil=pooling and params.get("round_mode", _CEIL) == _CEIL,
        is_global=params.get("global_pooling", False),
        method=_method(layer, params) if pooling else "",
    )


def _method(layer: CaffeLayer, params: dict[str, Any]) -> str:
    number = params.get("pool", 0)
    if not 0 <= number < len(_METHODS):
        raise UserError(
            f"Caffe layer {layer.name!r} has the pooling method {number}; expected 0 to "
            f"{len(_METHODS) - 1}. The file is damaged. Download it again."
        )
    return _METHODS[number]


def _pair(
    layer: CaffeLayer, params: dict[str, Any], name: str, sides: str | None, default: int
) -> tuple[int, int]:
    """Return a pair of sizes from one or two values, or from fields ending in ``_h`` and ``_w``."""
    if sides is not None and f"{sides}_h" in params:
        return params[f"{sides}_h"], params.get(f"{sides}_w", default)
    value = params.get(name, default)
    values = value if isinstance(value, list) else [value]
    if len(values) > 2:
        raise UserError(
            f"Caffe layer {layer.name!r}: {name} has {len(values)} values; expected 1 or 2. The "
            "file is damaged. Download it again."
        )
    return (values[0], values[-1]) if values else (default, default)
