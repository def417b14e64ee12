"""Conversion of tensor names for VGG-16, BN-Inception and Inception-ResNet-v2.

See :mod:`~.renaming` for other networks.
"""

import re
from collections.abc import Mapping

from senet_transfer.weights.families.renaming import Rename

_TENSOR = "(weight|bias|running_mean|running_var|num_batches_tracked)"


def _by_layer(layers: Mapping[str, str], norm: str) -> Rename:
    """Return a rename function that replaces layer names.

    Args:
        layers: Mapping from the other project's layer names to this project's.
        norm: Regular expression for the text between the layer name and the tensor name. Its single
            group must be non-empty for tensors of norms and empty for all other tensors.
    """
    pattern = re.compile(rf"(.+?){norm}{_TENSOR}")

    def rename(name: str) -> str | None:
        match = pattern.fullmatch(name)
        if match is None or match[1] not in layers:
            return None
        return f"{layers[match[1]]}.{'norm.' if match[2] else ''}{match[3]}"

    return rename


def _vgg_layers() -> dict[str, str]:
    # Indices of the 13 convolutions in torchvision's ``features``, and their names in this project.
    indices = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
    places = [f"stem.{i}" for i in range(4)]
    places += [f"res{stage}.{i}" for stage in (2, 3, 4) for i in range(3)]
    layers = {"classifier.0": "neck.fc1", "classifier.3": "neck.fc2", "classifier.6": "linear"}
    for index, place in zip(indices, places, strict=True):
        layers[f"features.{index}"] = f"{place}.conv"
        layers[f"features.{index + 1}"] = f"{place}.conv.norm"
    return layers


torchvision_vgg = _by_layer(_vgg_layers(), r"()\.")

# BN-Inception's modules and their names in this project.
_MODULES = {
    **{"3a": "res3.1", "3b": "res3.2", "3c": "res4.0"},
    **{"4a": "res4.1", "4b": "res4.2", "4c": "res4.3", "4d": "res4.4", "4e": "res5.0"},
    **{"5a": "res5.1", "5b": "res5.2"},
}


def _bn_inception_layers(join: str, double: tuple[str, str, str]) -> dict[str, str]:
    """Return a mapping from BN-Inception's layer names to this project's.

    Args:
        join: Separator between the module name and the convolution name.
        double: Names of the convolutions in the branch with two 3x3 convolutions.
    """
    parts = {
        "1x1": "branch_1x1",
        "3x3_reduce": "branch_3x3.0",
        "3x3": "branch_3x3.1",
        **{name: f"branch_double.{index}" for index, name in enumerate(double)},
        "pool_proj": "branch_pool",
    }
    layers = {
        f"conv1{join}7x7_s2": "stem.conv1",
        f"conv2{join}3x3_reduce": "res2.0.conv1",
        f"conv2{join}3x3": "res2.0.conv2",
    }
    for module, place in _MODULES.items():
        for theirs, ours in parts.items():
            layers[f"inception_{module}{join}{theirs}"] = f"{place}.{ours}"
    return layers


_CAFFE_GATES = {
    f"inception_{module}_1x1_{theirs}": f"{place}.se.{ours}"
    for module, place in _MODULES.items()
    for theirs, ours in (("down", "fc1"), ("up", "fc2"))
}

# The SENet authors' SE-BN-Inception, with BatchNorm and Scale stored as one layer or as two.
caffe_bn_inception = _by_layer(
    {
        **_bn_inception_layers("/", ("double3x3_reduce", "double3x3a", "double3x3b")),
        **_CAFFE_GATES,
        "classifier": "linear",
    },
    r"((?:/bn)?(?:/scale)?)/",
)

cadene_bn_inception = _by_layer(
    {
        **_bn_inception_layers("_", ("double_3x3_reduce", "double_3x3_1", "double_3x3_2")),
        "last_linear": "linear",
    },
    r"(_bn)?\.",
)


def _inception_resnet_layers(classifier: str) -> dict[str, str]:
    """Return a mapping from Inception-ResNet-v2's layer names to this project's.

    The names in timm's and Cadene's files differ only for the classifier.
    """
    layers = {
        classifier: "linear",
        "conv2d_1a": "stem.0.conv",
        "conv2d_2a": "stem.1.conv",
        "conv2d_2b": "stem.2.conv",
        "conv2d_3b": "res2.0.conv",
        "conv2d_4a": "res2.1.conv",
        "conv2d_7b": "res5.11.conv",
    }
    blocks = {"mixed_5b": "res3.1", "mixed_6a": "res4.0", "mixed_7a": "res5.0"}
    blocks |= {f"repeat.{i}": f"res3.{i + 2}" for i in range(10)}
    blocks |= {f"repeat_1.{i}": f"res4.{i + 1}" for i in range(20)}
    blocks |= {f"repeat_2.{i}": f"res5.{i + 1}" for i in range(9)} | {"block8": "res5.10"}
    for theirs, ours in blocks.items():
        layers[f"{theirs}.conv2d"] = f"{ours}.project"
        for branch in range(3):
            # A branch with a single convolution has no index.
            layers[f"{theirs}.branch{branch}"] = f"{ours}.branches.{branch}.0"
            for part in range(3):
                layers[f"{theirs}.branch{branch}.{part}"] = f"{ours}.branches.{branch}.{part}"
    # Index 0 is the pool.
    layers["mixed_5b.branch3.1"] = "res3.1.project"
    return layers


timm_inception_resnet = _by_layer(_inception_resnet_layers("classif"), r"(?:\.conv|(\.bn))?\.")

cadene_inception_resnet = _by_layer(
    _inception_resnet_layers("last_linear"), r"(?:\.conv|(\.bn))?\."
)
