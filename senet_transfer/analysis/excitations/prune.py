"""Dropping the gates of a stage, and what it costs (paper, section 4).

Most of SE's parameters are in the last stage, whose gates the paper found could be removed at a
small cost. Without training, a gate can be dropped in two ways: it becomes 1, or it becomes its
mean over the images of the analysis, a scale a channel that the convolution before it takes in,
so that the network has no trace of the gate left. The latter is exact for a gate that is the same
for all images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from senet_transfer.analysis.excitations.collect import Excitations, backbone_of
from senet_transfer.analysis.excitations.gates import gates_of, stage_of
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification import evaluate_classifier
from senet_transfer.models.backbones.blocks import SEBasicBlock, SEBottleneckBlock
from senet_transfer.models.backbones.cifar_blocks import PreActBlock
from senet_transfer.models.backbones.inception_resnet import InceptionResidualBlock
from senet_transfer.models.backbones.shufflenet import ShuffleUnit
from senet_transfer.models.image_classifier import ImageClassifier
from senet_transfer.weights import save_weights

# By the block, the last convolution of its residual branch: the first of these that it has.
_LAST: dict[type[nn.Module], tuple[str, ...]] = {
    SEBasicBlock: ("conv2",),
    SEBottleneckBlock: ("conv3",),
    PreActBlock: ("conv3", "conv2"),
    InceptionResidualBlock: ("project",),
    ShuffleUnit: ("expand",),
}


@dataclass(frozen=True)
class Pruned:
    """A network with or without gates, evaluated.

    Attributes:
        name: which.
        model: it.
        parameters: of the whole classifier.
        top1_error: in percent.
        top5_error: likewise.
    """

    name: str
    model: ImageClassifier
    parameters: int
    top1_error: float
    top5_error: float


def pruned_config(cfg: CfgNode, model: ImageClassifier, stages: list[int]) -> CfgNode:
    """The config of the network without the gates of these stages.

    Raises:
        UserError: a stage has no gates, or the model is none whose gates can be dropped.
    """
    if not isinstance(model, ImageClassifier):
        raise UserError(
            "Gates are dropped from classifiers, whose accuracy tells the cost; this is a "
            f"{type(model).__name__}. Prune the classifier that it starts from."
        )
    if cfg.MODEL.SE.RELU_BEFORE:
        raise UserError(
            "This network has a ReLU before each gate (MODEL.SE.RELU_BEFORE), which would go with "
            "the gate: what is left would be another network. Such gates can't be dropped."
        )
    found = {stage_of(name) for name in gates_of(model.backbone)}
    has = sorted(stage for stage in found if stage is not None)
    wrong = [stage for stage in stages if stage not in has]
    if wrong:
        raise UserError(
            f"The stages {wrong} have no gates to drop; those of {', '.join(map(str, has))} have."
        )
    cfg = cfg.clone()
    cfg.defrost()
    left = tuple(stage for stage in has if stage not in stages)
    if left:
        cfg.MODEL.SE.STAGES = left
    else:
        cfg.MODEL.SE.ENABLED = False
        cfg.MODEL.BACKBONE.ARCH = cfg.MODEL.BACKBONE.ARCH.removeprefix("se_")
    return cfg


def without_gates(
    cfg: CfgNode, model: ImageClassifier, scales: dict[str, np.ndarray] | None = None
) -> ImageClassifier | None:
    """The network of a config of :func:`pruned_config` with the weights of a model with gates.

    Args:
        cfg: it.
        model: with the gates.
        scales: what each gate becomes, `(C,)` by the paper's name; None is 1 everywhere.

    Returns:
        The network on the model's device in evaluation mode; None where a gate does not stand
        right behind a convolution, which could take its scale in.
    """
    pruned = build_model(cfg)
    state = pruned.state_dict()
    state.update({name: value for name, value in model.state_dict().items() if name in state})
    pruned.load_state_dict(state)
    backbone = backbone_of(pruned)
    backbone.preprocessing = model.preprocessing
    paths = {module: path for path, module in backbone_of(model).named_modules()}
    there = {path for path, _ in backbone.named_modules()}
    for name, gate in gates_of(backbone_of(model)).items():
        if not scales or paths[gate] in there:
            continue
        conv = _convolution_before(backbone, backbone_of(model), paths[gate])
        if conv is None:
            return None
        _scale_output(conv, torch.from_numpy(scales[name]))
    return pruned.to(model.device).eval()


def _convolution_before(pruned: nn.Module, backbone: nn.Module, path: str) -> nn.Module | None:
    """The last convolution of the residual branch that a gate stood right behind."""
    block_path, _, _ = path.rpartition(".")
    block, plain = backbone.get_submodule(block_path), pruned.get_submodule(block_path)
    names = next((names for kind, names in _LAST.items() if isinstance(block, kind)), None)
    if names is None or block.placement != "standard":
        return None
    return next(conv for name in names if (conv := getattr(plain, name, None)) is not None)


def _scale_output(conv: nn.Module, scale: torch.Tensor) -> None:
    """Multiplies what a convolution, with its norm if it has one, puts out."""
    norm = getattr(conv, "norm", None)
    layer = conv if norm is None else norm
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = getattr(layer, name, None)
            if value is not None:
                factor = scale.to(value).reshape(-1, *[1] * (value.dim() - 1))
                value.mul_(factor)


def measure_pruning(
    cfg: CfgNode,
    model: ImageClassifier,
    found: Excitations,
    dataset: ClassificationDataset,
    transform: EvalTransform,
    **options: Any,
) -> list[Pruned]:
    """Evaluates a classifier with its gates, with some at 1, and with these at their means.

    Args:
        cfg: of :func:`pruned_config`.
        model: with the gates.
        found: their statistics.
        dataset: to evaluate on, all of it.
        transform: the view of an image that is scored.
        options: of ``evaluate_classifier``.

    Returns:
        The three, or the first two where the means can't be taken in.
    """
    means = {name: block.mean_of_classes for name, block in found.blocks.items()}
    candidates = {
        "with its gates": model,
        "gates at 1": without_gates(cfg, model),
        "gates at their means": without_gates(cfg, model, means),
    }
    rows = []
    for name, candidate in candidates.items():
        if candidate is not None:
            result = evaluate_classifier(candidate, dataset, transform, **options)
            size = sum(parameter.numel() for parameter in candidate.parameters())
            rows.append(Pruned(name, candidate, size, result.top1_error, result.top5_error))
    return rows


def pruning_table(rows: list[Pruned]) -> str:
    """Accuracy and parameters, and how they differ from the first row's."""
    first = rows[0]
    lines = [
        (
            row.name,
            f"{row.top1_error:.2f}",
            f"{row.top1_error - first.top1_error:+.2f}",
            f"{row.top5_error:.2f}",
            f"{row.top5_error - first.top5_error:+.2f}",
            f"{row.parameters:,}",
            f"{100 * (row.parameters / first.parameters - 1):+.1f}%",
        )
        for row in rows
    ]
    headers = ("", "top-1 error", "", "top-5 error", "", "parameters", "")
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def save_pruned(cfg: CfgNode, rows: list[Pruned], folder: str) -> str:
    """Writes the better of the networks without gates, and its config beside it.

    Returns:
        The path of the checkpoint.

    Raises:
        UserError: it can't be written.
    """
    best = min(rows[1:], key=lambda row: (row.top1_error, row.top5_error))
    path = str(Path(folder, "model.pth"))
    save_weights(best.model, path)
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_FAMILY = path, ""
    cfg.OUTPUT_DIR = folder
    Path(folder, "config.yaml").write_text(cfg.dump())
    return path
