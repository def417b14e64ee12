"""Layer options, such as the stride placement, that affect outputs but not tensor shapes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

_WORDS = {
    "stride_in_1x1": (
        "the stride of downsampling bottlenecks is in the",
        "MODEL.RESNETS.STRIDE_IN_1X1",
    ),
    "stem_pool": ("the stem's max pool is", "MODEL.RESNETS.STEM_POOL"),
    "se_relu_before": ("the option for a ReLU before the SE gates is", "MODEL.SE.RELU_BEFORE"),
}


@dataclass(frozen=True)
class Geometry:
    """Layer options of a network that tensor shapes do not determine.

    Loading weights into a network with different options causes no error in PyTorch, but lowers the
    accuracy. None means that an option is unknown or does not apply to the network.

    Attributes:
        stride_in_1x1: Whether bottlenecks have their stride in the first 1x1 convolution instead of
            the 3x3 convolution (ResNet and ResNeXt with 50 or more layers).
        stem_pool: Border handling of the stem's max pool: "pad" (padding 1), "ceil" (no padding,
            ceil mode), or "none" if the network has no max pool (only ``wideresnet18``).
        se_relu_before: Whether a ReLU is applied to the residual branch before its SE gate.
    """

    stride_in_1x1: bool | None = None
    stem_pool: str | None = None
    se_relu_before: bool | None = None

    def options(self) -> dict[str, Any]:
        """Return the known layer options as keyword arguments for ``create_backbone``."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        if not self.has_pool:
            del known["stem_pool"]
        return known

    @property
    def has_pool(self) -> bool:
        """Return whether the stem has a max pool. All networks except ``wideresnet18`` have one."""
        return self.stem_pool != "none"

    def contradictions(self, model: "Geometry") -> list[str]:
        """Return sentences that describe how the layer options of a file differ from a model's."""
        found = []
        for name, value in asdict(self).items():
            if value is None:
                continue
            built = getattr(model, name)
            if built is not None and built != value:
                words, key = _WORDS[name]
                found.append(
                    f"The file's network and the model differ: {words} {_say(name, value)} in the "
                    f"file and {_say(name, built)} in the model ({name}, {key})."
                )
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Geometry":
        """Create a ``Geometry`` from a dict of its fields. Values of the wrong type become None."""
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
    """Return the layer options of a built model.

    Args:
        backbone: The model's backbone.
        stages: Stages by name, including res5 of a C4 head, which is not part of the backbone.
    """
    # Imported here to avoid a circular import: importing Detectron2 registers the models, which
    # import this module.
    from detectron2.modeling.backbone.resnet import BasicStem

    stem = getattr(backbone, "stem", None)
    # Detectron2's own stem has no option for the pool and always pads.
    pool = getattr(stem, "pool", "pad" if isinstance(stem, BasicStem) else None)
    stride, relu = None, None
    for stage in stages.values():
        for block in stage.children():
            if hasattr(block, "se"):
                relu = getattr(block, "relu_before", None)
            if hasattr(block, "conv3") and getattr(block, "stride", 1) == 2:
                stride = block.conv1.stride[0] == 2
    return Geometry(stride, pool, relu)
