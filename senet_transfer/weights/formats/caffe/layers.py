"""A layer of a Caffe network, whichever file it was read from, and its geometry."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from senet_transfer.errors import UserError

# Caffe's default of BatchNormParameter.eps.
DEFAULT_EPS = 1e-5


@dataclass(frozen=True)
class CaffeLayer:
    """One layer.

    Attributes:
        name: such as ``conv2_1_1x1_reduce/bn``.
        type: in today's spelling, such as ``Convolution``, also where an old file says CONVOLUTION.
        bottoms: names of the blobs it reads.
        tops: names of the blobs it writes.
        blobs: its numbers, float32 arrays that may be read-only views of the file. None in a
            definition.
        params: the layer's parameters as the file states them, such as
            ``{"convolution_param": {"num_output": 64, "kernel_size": [3], "bias_term": False}}``;
            what is repeated in Caffe's message is a list. Defaults are not filled in.
    """

    name: str
    type: str
    bottoms: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    blobs: tuple[np.ndarray, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        """What a BatchNorm layer adds to the variance."""
        return self.params.get("batch_norm_param", {}).get("eps", DEFAULT_EPS)

    @property
    def in_training_only(self) -> bool:
        """Whether the layer is left out of the network that is tested."""
        phases = [rule.get("phase") for rule in self.params.get("include", [])]
        return bool(phases) and all(phase == "TRAIN" for phase in phases)


@dataclass(frozen=True)
class Window:
    """The geometry of a Convolution or Pooling layer, defaults filled in; pairs are (y, x).

    Attributes:
        kernel: size in pixels; (0, 0) where a pooling is global.
        stride: in pixels.
        pad: in pixels, on each side.
        dilation: 1 is an ordinary convolution.
        group: of a convolution.
        ceil: whether a pooling rounds its output size up, as Caffe's does unless told otherwise.
        is_global: whether a pooling takes the whole image.
        method: "MAX", "AVE" or "STOCHASTIC"; empty for a convolution.
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
    """The geometry of a Convolution or Pooling layer.

    Raises:
        UserError: the layer is of another type, or states no geometry: a ``.caffemodel`` may hold
            blobs alone; then the definition beside it is needed.
    """
    key = {"Convolution": "convolution_param", "Pooling": "pooling_param"}.get(layer.type)
    if key is None or key not in layer.params:
        raise UserError(
            f"Caffe layer {layer.name!r} ({layer.type}) states no geometry. It is in the network's "
            "definition (.prototxt)."
        )
    params = layer.params[key]
    pooling = layer.type == "Pooling"
    return Window(
        kernel=_pair(layer, params, "kernel_size", "kernel", 0),
        stride=_pair(layer, params, "stride", "stride", 1),
        pad=_pair(layer, params, "pad", "pad", 0),
        dilation=_pair(layer, params, "dilation", None, 1),
        group=params.get("group", 1),
        ceil=pooling and params.get("round_mode", "CEIL") == "CEIL",
        is_global=params.get("global_pooling", False),
        method=params.get("pool", "MAX") if pooling else "",
    )


def _pair(
    layer: CaffeLayer, params: dict[str, Any], name: str, sides: str | None, default: int
) -> tuple[int, int]:
    """Caffe states a size once, once a dimension, or as ``_h`` and ``_w``."""
    if sides is not None and f"{sides}_h" in params:
        return params[f"{sides}_h"], params.get(f"{sides}_w", default)
    value = params.get(name, default)
    values = value if isinstance(value, list) else [value]
    if len(values) > 2:
        raise UserError(
            f"Caffe layer {layer.name!r}: {name} has {len(values)} numbers, not 1 or 2."
        )
    return (values[0], values[-1]) if values else (default, default)
