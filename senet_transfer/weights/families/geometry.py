"""What no shape of a weight file shows, and accuracy depends on: its geometry."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

_WORDS = {
    "stride_in_1x1": ("its stride-2 bottlenecks stride in the", "MODEL.RESNETS.STRIDE_IN_1X1"),
    "stem_pool": ("its stem's max pool is of the kind", "MODEL.RESNETS.STEM_POOL"),
    "se_relu_before": ("a ReLU stands before its SE gates:", "MODEL.SE.RELU_BEFORE"),
}


@dataclass(frozen=True)
class Geometry:
    """How the network of a file or of a model computes, beyond its shapes.

    Networks that differ in these have the same tensors, so a file of one loads into the other and
    nothing tells but the accuracy. None: not known, or means nothing for the network.

    Attributes:
        stride_in_1x1: whether bottlenecks have their stride in the first 1x1 convolution, not in
            the 3x3 (ResNet and ResNeXt from depth 50 on).
        stem_pool: how the stem's max pool ends, "pad" or "ceil".
        se_relu_before: whether a ReLU stands between the residual branch and its gate.
    """

    stride_in_1x1: bool | None = None
    stem_pool: str | None = None
    se_relu_before: bool | None = None

    def options(self) -> dict[str, Any]:
        """What is known of it, under the names of ``create_backbone``'s overrides."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def contradictions(self, model: "Geometry") -> list[str]:
        """How a file's geometry, this one, differs from that of a model, in sentences."""
        found = []
        for name, value in self.options().items():
            built = getattr(model, name)
            if built is not None and built != value:
                words, key = _WORDS[name]
                found.append(
                    f"The file's network and the model differ: {words} {_say(name, value)} in the "
                    f"file's, {_say(name, built)} in the model's ({name}, {key})."
                )
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Geometry":
        """Return the opposite of ``dataclasses.asdict``; a value of another type is unknown."""
        stride, pool, relu = (values.get(field.name) for field in fields(cls))
        return cls(
            stride_in_1x1=stride if isinstance(stride, bool) else None,
            stem_pool=pool if isinstance(pool, str) else None,
            se_relu_before=relu if isinstance(relu, bool) else None,
        )


def _say(name: str, value: object) -> str:
    if name == "stride_in_1x1":
        return "1x1 convolution" if value else "3x3 convolution"
    return repr(value)


def built_geometry(backbone: nn.Module, stages: dict[str, nn.Module]) -> Geometry:
    """The geometry of a model that stands.

    Args:
        backbone: the backbone, whose ``stem`` is looked at.
        stages: its stages by name; with the C4 head's res5, which is no part of the backbone.
    """
    # Imported only now, because the models, which use this module, are registered by that import.
    from detectron2.modeling.backbone.resnet import BasicStem

    stem = getattr(backbone, "stem", None)
    # A stem without the choice is Detectron2's own.
    pool = getattr(stem, "pool", "pad" if isinstance(stem, BasicStem) else None)
    stride, relu = None, None
    for stage in stages.values():
        for block in stage.children():
            if hasattr(block, "se"):
                relu = getattr(block, "relu_before", None)
            if hasattr(block, "conv3") and getattr(block, "stride", 1) == 2:
                stride = block.conv1.stride[0] == 2
    return Geometry(stride, pool, relu)
