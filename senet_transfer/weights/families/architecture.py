"""Backbone architecture, inferred from tensor names and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

_BLOCK = re.compile(r"res([2-5])\.(\d+)\.")

_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


# Networks other than ResNets, each with a pattern that matches tensor names of this network only.
_OTHERS = {
    "bn_inception": re.compile(r"res[3-5]\.\d+\.branch_double\.\d\.weight"),
    "inception_resnet_v2": re.compile(r"res[3-5]\.\d+\.branches\.\d\.\d\.weight"),
    "mobilenet": re.compile(r"res[2-5]\.\d+\.pointwise\.weight"),
    "shufflenet_g3": re.compile(r"res[3-5]\.\d+\.compress\.weight"),
    "vgg16_bn": re.compile(r"res[2-4]\.\d+\.conv\.weight"),
}


@dataclass(frozen=True)
class Architecture:
    """Backbone architecture, as far as it can be inferred from tensor names and shapes.

    Attributes:
        blocks: Number of blocks in each stage, starting with res2. A truncated backbone has fewer
            entries.
        bottleneck: Whether the blocks are bottlenecks.
        groups: Number of groups in the 3x3 convolutions.
        width_per_group: Number of channels per group in res2.
        deep_stem: Whether the stem has three 3x3 convolutions.
        se_stages: Numbers of the stages with SE layers, such as 2 for res2.
        se_ratio: Ratio of channels to hidden units in the last of these stages; 0 if there are no
            SE layers.
        se_divisor: 8 if the hidden widths are rounded to multiples of 8, else 1.
        se_bias: Whether the SE layers have biases; True if there are no SE layers.
        classes: Number of classifier outputs; 0 if there is no classifier.
        network: Network name without the prefix ``se_``; empty for a ResNet. If the name is set,
            the fields that describe residual blocks are not used.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    groups: int
    width_per_group: int
    deep_stem: bool
    se_stages: tuple[int, ...]
    se_ratio: int
    se_divisor: int
    se_bias: bool
    classes: int
    network: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Architecture | None":
        """Infer the architecture from a state dict with this project's tensor names.

        Return None if the architecture is unknown.
        """
        linear = _shape(tensors, "linear.weight")
        classes = linear[0] if linear else 0
        for network, pattern in _OTHERS.items():
            if any(pattern.fullmatch(name) for name in tensors):
                return cls((), False, 1, 0, False, classes=classes, network=network, **_se(tensors))
        counts: dict[int, int] = {}
        for name in tensors:
            if match := _BLOCK.match(name):
                stage, index = int(match[1]), int(match[2])
                counts[stage] = max(counts.get(stage, 0), index + 1)
        # The widths are inferred from the second convolution. Without it, the architecture is
        # unknown.
        conv = _shape(tensors, "res2.0.conv2.weight")
        if not counts or len(conv) != 4 or 0 in conv:
            return None
        bottleneck = "res2.0.conv3.weight" in tensors
        groups = _groups(tensors, conv) if bottleneck else 1
        return cls(
            blocks=tuple(counts[stage] for stage in sorted(counts)),
            bottleneck=bottleneck,
            groups=groups,
            width_per_group=conv[0] // groups,
            deep_stem="stem.conv3.weight" in tensors,
            classes=classes,
            **_se(tensors),
        )

    @property
    def is_senet154(self) -> bool:
        """Return whether the blocks and the stem are those of SENet-154, not of a ResNeXt."""
        return self.deep_stem and self.groups == 64 and self.bottleneck

    @property
    def name(self) -> str:
        """Return the model name, or a description if no registered model has this architecture."""
        if self.network:
            return f"se_{self.network}" if self.se_stages else self.network
        if self.is_senet154 and self.blocks == (3, 8, 36, 3):
            return "senet154"
        depth = _DEPTHS.get((self.blocks, self.bottleneck))
        kind = "bottlenecks" if self.bottleneck else "basic blocks"
        name = f"resnet{depth}"
        if depth is None:
            name = f"a residual network with {'-'.join(map(str, self.blocks))} {kind}"
        elif self.groups > 1 or self.width_per_group != 64:
            name = f"resnext{depth}_{self.groups}x{self.width_per_group}d"
        if self.deep_stem:
            name += " with a three-convolution stem"
        return f"se_{name}" if self.se_stages and depth else name

    def differences(self, other: "Architecture") -> list[str]:
        """Return sentences that describe how a file's network differs from a model (``other``)."""
        found = []
        if self.name.removeprefix("se_") != other.name.removeprefix("se_"):
            found.append(f"The file contains {self.name}, but the model is {other.name}.")
        if self.se_stages and not other.se_stages:
            found.append(
                "The file has SE layers, but the model has none. Use the model with SE (se_..., or "
                "MODEL.SE.ENABLED True)."
            )
        elif self.se_stages and self.se_stages != other.se_stages:
            found.append(
                f"The file has SE in stages {self.se_stages}, but the model has SE in stages "
                f"{other.se_stages}."
            )
        if not (self.se_stages and other.se_stages):
            return found
        if self.se_bias != other.se_bias:
            has, lacks = ("have", "do not") if self.se_bias else ("have no", "do")
            found.append(
                f"The file's SE layers {has} biases, but the model's {lacks}. Build the model with "
                f"se_bias={self.se_bias} (MODEL.SE.BIAS)."
            )
        if (self.se_ratio, self.se_divisor) != (other.se_ratio, other.se_divisor):
            found.append(
                f"The file's SE layers have ratio {self.se_ratio} and divisor {self.se_divisor}, "
                f"but the model's have ratio {other.se_ratio} and divisor {other.se_divisor} "
                "(se_ratio, se_divisor; MODEL.SE.RATIO, MODEL.SE.DIVISOR)."
            )
        return found


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape) if name in tensors else ()


def _groups(tensors: Mapping[str, Tensor], conv: tuple[int, ...]) -> int:
    inputs = (_shape(tensors, "res2.0.conv1.weight") or (conv[0],))[0]
    return max(1, inputs // conv[1])


class _SEFields(TypedDict):
    """Fields of :class:`Architecture` that describe the SE layers."""

    se_stages: tuple[int, ...]
    se_ratio: int
    se_divisor: int
    se_bias: bool


def _se(tensors: Mapping[str, Tensor]) -> _SEFields:
    widths = {}
    for name in tensors:
        match = _BLOCK.match(name)
        if match and name.endswith(".se.fc1.weight") and tensors[name].ndim == 2:
            hidden, channels = tensors[name].shape
            widths[int(match[1])] = (channels, max(1, hidden))
    # Count a stage even if fc1 is missing. Otherwise, a damaged file would be treated as one
    # without SE.
    stages = {int(m[1]) for name in tensors if ".se." in name and (m := _BLOCK.match(name))}
    ratio = 0
    if widths:
        channels, hidden = widths[max(widths)]
        ratio = channels // hidden
    exact = all(channels // hidden == ratio for channels, hidden in widths.values())
    return {
        "se_stages": tuple(sorted(stages)),
        "se_ratio": ratio,
        "se_divisor": 1 if exact else 8,
        "se_bias": not widths or any(name.endswith(".se.fc1.bias") for name in tensors),
    }
