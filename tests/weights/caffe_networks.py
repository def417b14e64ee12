"""Builders for the Caffe networks of SENet's authors and CSAIL, based on their prototxt files.

Sources: ``models/*.prototxt`` in hujie-frank/SENet, including SE-BN-Inception, and
``deploy_resnet152_places365.prototxt`` in CSAILVision/places365. Weights and statistics are random.
"""

from dataclasses import dataclass

import numpy as np

from tests.weights.caffe_writer import CaffeNet


@dataclass(frozen=True)
class Design:
    """Architecture options of the SENet authors' networks."""

    blocks: tuple[int, ...]
    groups: int = 1
    width: int = 64  # channels of the 3x3 convolutions in stage 2
    reduce: int = 64  # channels of the first 1x1 convolutions in stage 2
    stride_in_1x1: bool = True
    deep_stem: bool = False


DESIGNS = {
    "SE-ResNet-50": Design((3, 4, 6, 3)),
    "SE-ResNet-101": Design((3, 4, 23, 3)),
    "SE-ResNet-152": Design((3, 8, 36, 3)),
    "SE-ResNeXt-50": Design((3, 4, 6, 3), 32, 128, 128, stride_in_1x1=False),
    "SE-ResNeXt-101": Design((3, 4, 23, 3), 32, 128, 128, stride_in_1x1=False),
    "SENet-154": Design((3, 8, 36, 3), 64, 256, 128, stride_in_1x1=False, deep_stem=True),
}


class _Random:
    """Generator of random weights that preserve the scale of activations in deep networks."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def weight(self, *shape: int) -> np.ndarray:
        return self.rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)

    def bias(self, channels: int) -> np.ndarray:
        return self.rng.uniform(-0.5, 0.5, channels)

    def bn(self, channels: int) -> dict[str, np.ndarray]:
        return {
            "weight": self.rng.uniform(0.5, 1, channels),
            "bias": self.rng.uniform(-0.3, 0.3, channels),
            "running_mean": self.rng.uniform(-0.3, 0.3, channels),
            "running_var": self.rng.uniform(0.5, 1.5, channels),
        }


def senet(name: str, size: tuple[int, int] = (64, 96), classes: int = 1000) -> CaffeNet:
    """Build one of the SENet authors' networks, given the name in its prototxt."""
    design, random = DESIGNS[name], _Random(0)
    net = CaffeNet(name, (1, 3, *size))
    x = _stem(net, design, random)
    inputs = 128 if design.deep_stem else 64
    for stage, blocks in enumerate(design.blocks, 2):
        for index in range(1, blocks + 1):
            x = _block(net, design, random, stage, index, x, inputs)
            inputs = 256 * 2 ** (stage - 2)
    x = net.global_pool("pool5/7x7_s1", x)
    if design.deep_stem:
        x = net.dropout("pool5/drop", x, 0.2)
    net.fc("classifier", x, random.weight(classes, inputs), random.bias(classes))
    return net


def _stem(net: CaffeNet, design: Design, random: _Random) -> str:
    x = net.data
    if not design.deep_stem:
        geometry = {"stride": 2, "pad": 3, "relu": "conv1/relu_7x7_s2"}
        x = net.conv_bn("conv1/7x7_s2", x, random.weight(64, 3, 7, 7), random.bn(64), **geometry)
        return net.pool("pool1/3x3_s2", x, 3, 2)
    for i, (before, after) in enumerate([(3, 64), (64, 64), (64, 128)], 1):
        name = f"conv1_{i}/3x3" + ("_s2" if i == 1 else "")
        geometry = {"stride": 2 if i == 1 else 1, "pad": 1, "relu": f"{name}/relu"}
        x = net.conv_bn(name, x, random.weight(after, before, 3, 3), random.bn(after), **geometry)
    return net.pool("pool1/3x3_s2", x, 3, 2)


def _block(net, design, random, stage: int, index: int, x: str, inputs: int) -> str:
    level = 2 ** (stage - 2)
    reduce, width, outputs = design.reduce * level, design.width * level, 256 * level
    stride = 2 if stage > 2 and index == 1 else 1
    first, second = (stride, 1) if design.stride_in_1x1 else (1, stride)
    at = f"conv{stage}_{index}"

    def conv_bn(part, bottom, before, after, kernel, relu=True, group=1, **geometry):
        weight = random.weight(after, before // group, kernel, kernel)
        relu = f"{at}_{part}/relu" if relu else None
        geometry |= {"pad": kernel // 2, "group": group, "relu": relu, "factor": 999.98}
        return net.conv_bn(f"{at}_{part}", bottom, weight, random.bn(after), **geometry)

    y = conv_bn("1x1_reduce", x, inputs, reduce, 1, stride=first)
    y = conv_bn("3x3", y, reduce, width, 3, stride=second, group=design.groups)
    y = conv_bn("1x1_increase", y, width, outputs, 1, relu=False)
    hidden = outputs // 16
    gate = net.global_pool(f"{at}_global_pool", y)
    weights = random.weight(hidden, outputs, 1, 1), random.weight(outputs, hidden, 1, 1)
    gate = net.conv(f"{at}_1x1_down", gate, weights[0], random.bias(hidden))
    gate = net.relu(f"{at}_1x1_down/relu", gate)
    gate = net.sigmoid(
        f"{at}_prob", net.conv(f"{at}_1x1_up", gate, weights[1], random.bias(outputs))
    )
    if index == 1:
        kernel = 3 if design.deep_stem and stride == 2 else 1
        x = conv_bn("1x1_proj", x, inputs, outputs, kernel, relu=False, stride=stride)
    return net.relu(f"{at}/relu", net.axpy(at, gate, y, x))


# Channels in each module: 1x1 branch; 1x1 and 3x3 of the second branch; 1x1 and both 3x3 of the
# third branch; 1x1 after the pool. Modules with stride 2 have neither the first nor the last.
BN_INCEPTION = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (None, 128, 160, 64, 96, None),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (None, 128, 192, 192, 256, None),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}


def se_bn_inception(size: tuple[int, int] = (64, 96), classes: int = 1000) -> CaffeNet:
    """Build the SENet authors' SE-BN-Inception."""
    random = _Random(3)
    net = CaffeNet("SE-BN-Inception", (1, 3, *size))

    def conv_bn(name, bottom, before, after, kernel, stride=1):
        geometry = {"stride": stride, "pad": kernel // 2, "factor": 999.98}
        folder, _, last = name.rpartition("/")
        geometry["relu"] = f"{folder}/relu_{last.removesuffix('_s2')}"
        weight = random.weight(after, before, kernel, kernel)
        return net.conv_bn(name, bottom, weight, random.bn(after), **geometry)

    x = conv_bn("conv1/7x7_s2", net.data, 3, 64, 7, stride=2)
    x = conv_bn("conv2/3x3_reduce", net.pool("pool1/3x3_s2", x, 3, 2), 64, 64, 1)
    x = net.pool("pool2/3x3_s2", conv_bn("conv2/3x3", x, 64, 192, 3), 3, 2)
    inputs = 192
    for module, widths in BN_INCEPTION.items():
        x, inputs = _inception(net, random, conv_bn, f"inception_{module}", x, inputs, widths)
    x = net.global_pool("pool5/7x7_s1", x)
    net.fc("classifier", x, random.weight(classes, inputs), random.bias(classes))
    return net


def _inception(net, random, conv_bn, at: str, x: str, inputs: int, widths) -> tuple[str, int]:
    one, reduce, three, double_reduce, double, projection = widths
    stride = 1 if one else 2
    branches = [conv_bn(f"{at}/1x1", x, inputs, one, 1)] if one else []
    y = conv_bn(f"{at}/3x3_reduce", x, inputs, reduce, 1)
    branches.append(conv_bn(f"{at}/3x3", y, reduce, three, 3, stride))
    y = conv_bn(f"{at}/double3x3_reduce", x, inputs, double_reduce, 1)
    y = conv_bn(f"{at}/double3x3a", y, double_reduce, double, 3)
    branches.append(conv_bn(f"{at}/double3x3b", y, double, double, 3, stride))
    if one:
        method = "MAX" if at.endswith("5b") else "AVE"
        y = net.pool(f"{at}/pool", x, 3, 1, pad=1, method=method)
        branches.append(conv_bn(f"{at}/pool_proj", y, inputs, projection, 1))
    else:
        branches.append(net.pool(f"{at}/pool/3x3_s2", x, 3, 2))
    outputs = (one or 0) + three + double + (projection or inputs)
    x, hidden = net.concat(f"{at}/concat", *branches), outputs // 16
    gate = net.global_pool(f"{at}_global_pool", x)
    weights = random.weight(hidden, outputs, 1, 1), random.weight(outputs, hidden, 1, 1)
    gate = net.conv(f"{at}_1x1_down", gate, weights[0], random.bias(hidden))
    gate = net.relu(f"{at}_1x1_down/relu", gate)
    gate = net.conv(f"{at}_1x1_up", gate, weights[1], random.bias(outputs))
    return net.gate_channels(at, x, net.sigmoid(f"{at}_prob", gate)), outputs


def places_resnet(
    blocks: tuple[int, ...], size: tuple[int, int] = (64, 96), classes: int = 365
) -> CaffeNet:
    """Build the Caffe ResNet of the Places365 authors, with the given number of blocks per stage.

    The published ResNet-152 has (3, 8, 36, 3) blocks.
    """
    random = _Random(1)
    net = CaffeNet("ResNet-152-places365", (1, 3, *size))

    def conv_bn(name, bottom, before, after, kernel, *, norm, relu=True, stride=1):
        weight = random.weight(after, before, kernel, kernel)
        top = net.conv(name, bottom, weight, stride=stride, pad=kernel // 2)
        bn = random.bn(after)
        net.batch_norm(f"bn{norm}", top, bn["running_mean"], bn["running_var"], 999.98)
        net.scale(f"scale{norm}", top, bn["weight"], bn["bias"])
        return net.relu(f"{name}_relu", top) if relu else top

    x = conv_bn("conv1", net.data, 3, 64, 7, norm="_conv1", stride=2)
    x, inputs = net.pool("pool1", x, 3, 2), 64
    for stage, count in enumerate(blocks, 2):
        width, outputs = 64 * 2 ** (stage - 2), 256 * 2 ** (stage - 2)
        for index in range(count):
            stride = 2 if stage > 2 and index == 0 else 1
            # Blocks are called a, b, c in short stages and a, b1, b2, ... in long ones.
            letter = "abc"[index] if count == 3 else ("a" if index == 0 else f"b{index}")
            at = f"{stage}{letter}"
            y = x
            shapes = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            for part, (before, after, kernel) in zip("abc", shapes, strict=True):
                geometry = {"norm": f"{at}_branch2{part}", "relu": part != "c"}
                geometry["stride"] = stride if part == "a" else 1
                y = conv_bn(f"res{at}_branch2{part}", y, before, after, kernel, **geometry)
            if index == 0:
                geometry = {"norm": f"{at}_branch1", "relu": False, "stride": stride}
                x = conv_bn(f"res{at}_branch1", x, inputs, outputs, 1, **geometry)
            x = net.relu(f"res{at}_relu", net.add(f"res{at}", x, y))
            inputs = outputs
    net.fc(
        "fc365", net.global_pool("pool5", x), random.weight(classes, inputs), random.bias(classes)
    )
    return net
