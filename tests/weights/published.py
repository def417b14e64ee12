"""Plain-PyTorch networks of projects that can't be installed, based on published code.

Sources: mmpretrain's ``models/backbones/{resnet,seresnet}.py`` and ``models/utils/se_layer.py``;
moskomule/senet.pytorch's ``senet/{se_module,se_resnet}.py``; Caffe2's and Detectron's ResNets
(MSRA). Module names and the order of operations are those of the originals, not this project's.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Activated(nn.Module):
    """Module with a convolution named ``conv`` and an activation, like mmcv's ConvModule."""

    def __init__(self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


class MMSELayer(nn.Module):
    """mmpretrain's SE layer. Older versions have plain convolutions instead of ConvModules."""

    def __init__(self, channels: int, wrapped: bool):
        super().__init__()
        hidden = channels // 16
        self.wrapped = wrapped
        if wrapped:
            self.conv1 = Activated(channels, hidden, torch.relu)
            self.conv2 = Activated(hidden, channels, torch.sigmoid)
        else:
            self.conv1 = nn.Conv2d(channels, hidden, 1)
            self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        if self.wrapped:
            return x * self.conv2(self.conv1(pooled))
        return x * torch.sigmoid(self.conv2(torch.relu(self.conv1(pooled))))


class BiasFreeSELayer(nn.Module):
    """moskomule's SE layer, which has two linear layers without biases in ``fc``."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 16, bias=False),
            nn.ReLU(),
            nn.Linear(channels // 16, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return x * gate[:, :, None, None]


class Block(nn.Module):
    """Residual block, optionally with an SE layer.

    Args:
        se: Module name of the SE layer, and function that builds the layer for a number of
            channels; None for a block without SE.
    """

    def __init__(self, inputs, planes, stride, *, bottleneck, stride_in_1x1, se):
        super().__init__()
        outputs = planes * (4 if bottleneck else 1)
        if bottleneck:
            first, second = (stride, 1) if stride_in_1x1 else (1, stride)
            shapes = [(inputs, planes, 1, first), (planes, planes, 3, second)]
            shapes.append((planes, outputs, 1, 1))
        else:
            shapes = [(inputs, planes, 3, stride), (planes, planes, 3, 1)]
        self.depth = len(shapes)
        for i, (before, after, kernel, step) in enumerate(shapes, 1):
            conv = nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.se_name = se[0] if se else None
        if se:
            self.add_module(se[0], se[1](outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = torch.relu(out) if i < self.depth else out
        if self.se_name:
            out = getattr(self, self.se_name)(out)
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    """ResNet without a classifier, with torchvision's module names."""

    def __init__(self, depth: int, *, stride_in_1x1: bool = False, se=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for i, blocks in enumerate(BLOCKS[depth]):
            planes, stage = 64 * 2**i, []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                options = {"bottleneck": depth >= 50, "stride_in_1x1": stride_in_1x1, "se": se}
                stage.append(Block(channels, planes, stride, **options))
                channels = planes * (4 if depth >= 50 else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class PlainClassifier(Backbone):
    """Classifier with ``fc`` as a sibling of the stages, as in torchvision and moskomule's code."""

    def __init__(self, depth: int, classes: int = 1000, **options):
        super().__init__(depth, **options)
        self.fc = nn.Linear(self.channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(super().forward(x).mean((2, 3)))


class _Head(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.fc = nn.Linear(channels, classes)


class MMClassifier(nn.Module):
    """Classifier with ``backbone`` and ``head.fc``, as in mmpretrain's ImageClassifier."""

    def __init__(self, depth: int, se: bool, wrapped: bool = True):
        super().__init__()
        layer = ("se_layer", lambda channels: MMSELayer(channels, wrapped))
        self.backbone = Backbone(depth, se=layer if se else None)
        self.head = _Head(self.backbone.channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(self.backbone(x).mean((2, 3)))


def moskomule(depth: int) -> nn.Module:
    """Build an SE-ResNet with the module names of moskomule's senet.pytorch repository."""
    return PlainClassifier(depth, se=("se", BiasFreeSELayer))


def write_detectron2(model: PlainClassifier, path: Path) -> Path:
    """Write a file like Detectron2's MSRA R-50.pkl, with Caffe2's names and norm statistics."""
    norm = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean"}
    blobs = _caffe2_blobs(model, {**norm, "running_var": "running_var"})
    with open(path, "wb") as file:
        pickle.dump(blobs, file, protocol=2)
    return path


def write_detectron1(model: PlainClassifier, path: Path) -> Path:
    """Write a file like Detectron's R-50.pkl, with norm statistics folded into scale and bias."""
    state = model.state_dict()
    for name in [name for name in state if name.endswith("running_var")]:
        norm = name.removesuffix(".running_var")
        scale = state[f"{norm}.weight"] / torch.sqrt(state[name] + 1e-5)
        state[f"{norm}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        state[f"{norm}.weight"] = scale
    blobs = _caffe2_blobs(model, {"weight": "s", "bias": "b"}, state)
    blobs["conv1_b"] = np.zeros(64, np.float32)
    with open(path, "wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=2)
    return path


def _caffe2_blobs(model, norm: dict[str, str], state: dict | None = None) -> dict:
    state = state or model.state_dict()
    blobs = {"conv1_w": state["conv1.weight"], "fc1000_w": state["fc.weight"]}
    blobs["fc1000_b"] = state["fc.bias"]
    pairs = [("bn1", "res_conv1_bn")]
    for i in (1, 2, 3, 4):
        for j, block in enumerate(getattr(model, f"layer{i}")):
            ours, theirs = f"layer{i}.{j}", f"res{i + 1}_{j}_branch"
            for k, letter in enumerate("abc", 1):
                blobs[f"{theirs}2{letter}_w"] = state[f"{ours}.conv{k}.weight"]
                pairs.append((f"{ours}.bn{k}", f"{theirs}2{letter}_bn"))
            if block.downsample is not None:
                blobs[f"{theirs}1_w"] = state[f"{ours}.downsample.0.weight"]
                pairs.append((f"{ours}.downsample.1", f"{theirs}1_bn"))
    for ours, theirs in pairs:
        blobs |= {f"{theirs}_{new}": state[f"{ours}.{old}"] for old, new in norm.items()}
    return {name: np.asarray(value) for name, value in blobs.items()}
