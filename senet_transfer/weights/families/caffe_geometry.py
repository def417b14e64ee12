"""Stride placement and stem pool specified by the layer parameters in a Caffe file.

A ``.caffemodel`` usually contains layer parameters in addition to the weights. These parameters
take precedence over the defaults of the file's weight family, because some networks were trained
with modified network definitions.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.formats.caffe.layers import CaffeLayer, window_of

_FIRST_1X1 = re.compile(r"conv[345]_1_1x1_reduce|res[345]a_branch2a")
_FIRST_3X3 = re.compile(r"conv[345]_1_3x3|res[345]a_branch2b")


def stated_geometry(path: str | Path, layers: Iterable[CaffeLayer], expected: Geometry) -> Geometry:
    """Return the stride placement and stem pool specified by the layers of a Caffe network.

    Values that the layers do not specify are taken from ``expected``.

    Raises:
        UserError: If no backbone of this project supports these strides or this stem pool.
    """
    geometry = expected
    strides: dict[str, set[int]] = {"1x1": set(), "3x3": set()}
    for layer in layers:
        if layer.type == "Convolution" and "convolution_param" in layer.params:
            for kind, pattern in (("1x1", _FIRST_1X1), ("3x3", _FIRST_3X3)):
                if pattern.fullmatch(layer.name):
                    strides[kind].update(window_of(layer).stride)
        elif layer.type == "Pooling" and layer.name.startswith("pool1"):
            geometry = replace(geometry, stem_pool=_stem_pool(path, layer, expected))
    if expected.stride_in_1x1 is None or not strides["1x1"]:
        return geometry
    if (strides["1x1"], strides["3x3"]) not in (({2}, {1}), ({1}, {2})):
        raise UserError(
            f"{path}: The first 1x1 convolutions of the stages have strides "
            f"{sorted(strides['1x1'])}, and the first 3x3 convolutions have strides "
            f"{sorted(strides['3x3'])}; expected stride 2 in all of these 1x1 convolutions or in "
            "all of these 3x3 convolutions, and stride 1 in the others. Use weights of a supported "
            "network."
        )
    return replace(geometry, stride_in_1x1=strides["1x1"] == {2})


def _stem_pool(path: str | Path, layer: CaffeLayer, expected: Geometry) -> str | None:
    if "pooling_param" not in layer.params:
        return expected.stem_pool
    window = window_of(layer)
    shape = (window.method, window.kernel, window.stride, window.pad, window.ceil)
    if shape == ("MAX", (3, 3), (2, 2), (0, 0), True):
        return "ceil"
    if shape == ("MAX", (3, 3), (2, 2), (1, 1), False):
        return "pad"
    raise UserError(
        f"{path}: The pooling layer of the stem is not supported ({layer.name}: {window.method}, "
        f"kernel {window.kernel}, stride {window.stride}, pad {window.pad}, "
        f"{'ceil' if window.ceil else 'floor'} mode). Expected MAX with kernel (3, 3) and stride "
        "(2, 2), and either pad (0, 0) in ceil mode or pad (1, 1) in floor mode. Use weights of a "
        "supported network."
    )


def adjust_variances(
    layers: Iterable[CaffeLayer],
    renamed: Mapping[str, str | None],
    tensors: dict[str, Tensor],
    eps: float,
) -> list[str]:
    """Adjust the running variances of batch norms whose eps in the file differs from ``eps``.

    The difference is added to the running variance, so the outputs stay the same. ``tensors`` is
    modified in place.

    Returns:
        Notes for the user about the adjusted variances.
    """
    count, found = 0, set()
    for layer in layers:
        name = renamed.get(f"{layer.name}/running_var")
        if layer.type == "BatchNorm" and layer.eps != eps and name in tensors:
            tensors[name] = tensors[name] + (layer.eps - eps)
            count += 1
            found.add(layer.eps)
    if not count:
        return []
    return [f"{count} variances were adjusted for an eps of {', '.join(map(str, sorted(found)))}"]
