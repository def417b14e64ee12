"""Parameter count and computational cost of each component of a classifier or detector."""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import FPN, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from senet_transfer.analysis.complexity.count import Cost, Measured, measure
from senet_transfer.errors import UserError
from senet_transfer.models.classifier import Classifier
from senet_transfer.models.timm_backbone import TimmBackbone


@dataclass(frozen=True)
class Report:
    """Parameter count and computational cost of a model for one image size.

    Attributes:
        size: Height and width of the network's input in pixels.
        parts: Cost of each component of the model, such as a stage of the backbone, in the order of
            the forward pass.
        notes: Sentences about components and operators whose cost is excluded or depends on the
            config.
        modules: Cost of each module by name. For the ROI heads, only the parameters are counted.
    """

    size: tuple[int, int]
    parts: dict[str, Cost]
    notes: list[str]
    modules: dict[str, Cost]

    @property
    def total(self) -> Cost:
        """Parameter count and computational cost of the whole model."""
        return sum(self.parts.values(), Cost())


def report(model: nn.Module, cfg: CfgNode, size: tuple[int, int] | None = None) -> Report:
    """Compute the parameter count and the computational cost per image of a classifier or detector.

    For a two-stage detector, the cost includes the backbone, the FPN, the region proposal network
    and the box head for the maximum number of proposals (``MODEL.RPN.POST_NMS_TOPK_TEST``).

    Args:
        model: The model, on the CPU.
        cfg: The model's config.
        size: The image height and width in pixels. If None, a classifier's evaluation crop or a
            detector's largest test image size is used. For a detector, both sides are rounded up to
            a multiple of the backbone's ``size_divisibility``.

    Raises:
        UserError: If the model is neither a classifier nor a detector, or if the size is invalid.
    """
    if size and min(size) < 1:
        raise UserError(f"The image size is {size[0]} x {size[1]} pixels; expected at least 1 x 1.")
    if isinstance(model, Classifier):
        crop = cfg.INPUT.CLASSIFICATION.TEST_CROP
        return _classifier(model, size or (crop, crop))
    if isinstance(model, GeneralizedRCNN | DenseDetector):
        step = max(model.backbone.size_divisibility, 1)
        sides = size or (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        return _detector(model, cfg, tuple(-(-side // step) * step for side in sides))
    raise UserError(
        f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; expected ImageClassifier, "
        "GeneralizedRCNN or a dense detector such as RetinaNet."
    )


class _Whole(nn.Module):
    """Wrapper for the modules of a model that run once per image, without the preprocessing.

    For a two-stage detector, these modules are the backbone and the RPN head. For a dense detector,
    they are the backbone and the detection head.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        model = self.model
        if isinstance(model, Classifier):
            return Classifier.forward(model, x)
        features = model.backbone(x)
        if isinstance(model, DenseDetector):
            return model.head([features[name] for name in model.head_in_features])
        proposer = model.proposal_generator
        return proposer.rpn_head([features[name] for name in proposer.in_features])


class _Box(nn.Module):
    """Wrapper for a detector's box head and box predictor, with pooled ROI features as input."""

    def __init__(self, heads: nn.Module):
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> list[Tensor]:
        heads = self.heads
        if hasattr(heads, "res5"):
            return list(heads.box_predictor(heads.res5(x).mean((2, 3))))
        if isinstance(heads.box_head, nn.ModuleList):  # Cascade R-CNN
            stages = zip(heads.box_head, heads.box_predictor, strict=True)
            return [out for head, predict in stages for out in predict(head(x))]
        return list(heads.box_predictor(heads.box_head(x)))


def _measure_whole(model: nn.Module, size: tuple[int, int]) -> Measured:
    # Classifiers built by create_classifier have no normalisation.
    pixels = getattr(model, "pixel_mean", None)
    channels = len(model.preprocessing.mean) if pixels is None else len(pixels)
    try:
        return measure(_Whole(model), torch.zeros(1, channels, *size))
    except RuntimeError as error:
        raise UserError(
            f"The network can't process an image of {size[0]} x {size[1]} pixels: {error}. Pass a "
            "larger --size."
        ) from error


def _classifier(model: Classifier, size: tuple[int, int]) -> Report:
    found = _measure_whole(model, size)
    parts = _stages(model, "backbone", found)
    for name, _ in model.named_children():
        # Outside the backbone, list only modules with weights: the final linear layer and, in VGG,
        # the fully connected layers before it.
        if name != "backbone" and found.modules[f"model.{name}"].parameters:
            parts[name] = found.modules[f"model.{name}"]
    return Report(size, parts, _notes(found), _named(found))


def _detector(model: nn.Module, cfg: CfgNode, size: tuple[int, int]) -> Report:
    found = _measure_whole(model, size)
    notes = _notes(found)
    if isinstance(model.backbone, FPN):
        parts = _stages(model, "backbone.bottom_up", found)
        backbone = found.modules["model.backbone.bottom_up"]
        parts["FPN"] = found.modules["model.backbone"] - backbone
    else:
        parts = _stages(model, "backbone", found)
    if isinstance(model, DenseDetector):
        parts["head"] = found.modules["model.head"]
        return Report(size, parts, notes, _named(found))
    parts["RPN"] = found.modules["model.proposal_generator.rpn_head"]
    boxes = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    channels = model.backbone.output_shape()[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    region = measure(_Box(model.roi_heads), torch.zeros(1, channels, side, side))
    head = region.total
    notes += [f"The box head is counted for {boxes} boxes (MODEL.RPN.POST_NMS_TOPK_TEST)."]
    if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
        notes += [
            "Mask and keypoint heads run once per object, so only their parameters are counted."
        ]
    parts["box head"] = head.repeated(boxes)
    return Report(size, parts, [*notes, *_notes(region)], _named(found))


def _stages(model: nn.Module, backbone: str, found: Measured) -> dict[str, Cost]:
    module = model.get_submodule(backbone)
    if isinstance(module, TimmBackbone):
        backbone, module = f"{backbone}.net", module.net
    costs = {name: found.modules[f"model.{backbone}.{name}"] for name, _ in module.named_children()}
    return {name: cost for name, cost in costs.items() if cost.parameters}


def _named(found: Measured) -> dict[str, Cost]:
    """Return the cost of each module, keyed by the module's name in the measured model.

    In ``found.modules``, these names have the prefix ``model.`` of the wrapper :class:`_Whole`.
    """
    return {
        name.removeprefix("model."): cost
        for name, cost in found.modules.items()
        if name.startswith("model.")
    }


def _notes(found: Measured) -> list[str]:
    if not found.unknown:
        return []
    names = ", ".join(f"{name} ({times})" for name, times in found.unknown.items())
    return [f"Operators with unknown cost, which were not counted: {names}."]
