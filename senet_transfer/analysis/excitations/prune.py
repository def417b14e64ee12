"""Pruning of the SE gates of a stage, and its effect on accuracy (paper, section 4).

Most SE parameters are in the last stage, and the SENet paper found that the gates of this stage
could be removed with a small loss of accuracy. Without further training, a gate can be replaced by
the constant 1 or by its mean over the analysed images. The mean is a constant per channel, which is
folded into the preceding convolution. The replacement is exact for gates that have the same value
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
from senet_transfer.models.build import weights_follow
from senet_transfer.models.image_classifier import ImageClassifier
from senet_transfer.models.timm_backbone import TimmBackbone
from senet_transfer.weights import save_weights

# Candidate names for the last convolution in the residual branch, by block class. The first name
# found in a block is used.
_LAST: dict[type[nn.Module], tuple[str, ...]] = {
    SEBasicBlock: ("conv2",),
    SEBottleneckBlock: ("conv3",),
    PreActBlock: ("conv3", "conv2"),
    InceptionResidualBlock: ("project",),
    ShuffleUnit: ("expand",),
}


@dataclass(frozen=True)
class Pruned:
    """Evaluation results of a pruned network, or of the original network with all gates.

    Attributes:
        name: Description of the network's gates.
        model: Network that was evaluated.
        parameters: Number of parameters of the whole classifier.
        top1_error: Top-1 error in percent.
        top5_error: Top-5 error in percent.
    """

    name: str
    model: ImageClassifier
    parameters: int
    top1_error: float
    top5_error: float


def pruned_config(cfg: CfgNode, model: ImageClassifier, stages: list[int]) -> CfgNode:
    """Return the config of the network without the gates in the given stages.

    Raises:
        UserError: If a stage has no gates, or the model's gates can't be removed.
    """
    if not isinstance(model, ImageClassifier):
        raise UserError(
            f"Gates can only be removed from a classifier, but the model is a "
            f"{type(model).__name__}. Prune the classifier that the detector was initialised from."
        )
    if isinstance(model.backbone, TimmBackbone):
        raise UserError(
            f"The gates of {model.backbone.model_name} can't be removed, because timm builds this "
            "network. Use one of this project's networks, such as se_resnet50."
        )
    if cfg.MODEL.SE.RELU_BEFORE:
        raise UserError(
            "The gates of this network can't be removed: it has a ReLU before each gate "
            "(MODEL.SE.RELU_BEFORE), which would be removed together with the gate. Use a network "
            "without MODEL.SE.RELU_BEFORE."
        )
    found = {stage_of(name) for name in gates_of(model.backbone)}
    has = sorted(stage for stage in found if stage is not None)
    wrong = [stage for stage in stages if stage not in has]
    if wrong:
        raise UserError(
            f"The stages {wrong} have no gates; expected one or more of: "
            f"{', '.join(map(str, has))}."
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
    """Build the pruned network, and copy all weights except those of the removed gates.

    Args:
        cfg: The config returned by :func:`pruned_config`.
        model: The model with all gates.
        scales: The constants ``(C,)`` that replace the removed gates, keyed by the gate names
            returned by :func:`~.gates.gates_of`. If None, the gates are replaced by 1.

    Returns:
        The network in evaluation mode on the model's device, or None if the constants of a removed
        gate can't be folded into a convolution directly before the gate.
    """
    with weights_follow():
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
    """Return the convolution directly before a removed gate, or None if it can't be determined."""
    block_path, _, _ = path.rpartition(".")
    block, plain = backbone.get_submodule(block_path), pruned.get_submodule(block_path)
    names = next((names for kind, names in _LAST.items() if isinstance(block, kind)), None)
    if names is None or block.placement != "standard":
        return None
    return next(conv for name in names if (conv := getattr(plain, name, None)) is not None)


def _scale_output(conv: nn.Module, scale: torch.Tensor) -> None:
    """Scale the output channels of a convolution, or those of its norm layer if it has one."""
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
    """Evaluate a classifier with all gates, and with some gates replaced by 1 or by their means.

    Args:
        cfg: The config returned by :func:`pruned_config`.
        model: The model with all gates.
        found: The gate statistics.
        dataset: The evaluation dataset. All of its images are used.
        transform: The evaluation transform.
        options: Keyword arguments for ``evaluate_classifier``.

    Returns:
        The results with all gates, with gates replaced by 1, and with gates replaced by their
        means. If the means can't be folded into convolutions, the result with means is omitted.
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
    """Format a table of errors and parameter counts, with differences from the unpruned network."""
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
    """Save the pruned network with the lowest error, together with its config.

    Returns:
        The path of the checkpoint.

    Raises:
        UserError: If the checkpoint can't be written.
    """
    best = min(rows[1:], key=lambda row: (row.top1_error, row.top5_error))
    path = str(Path(folder, "model.pth"))
    save_weights(best.model, path)
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_FAMILY, cfg.MODEL.WEIGHTS_PREFIX = path, "", ""
    cfg.MODEL.WEIGHTS_EMA, cfg.MODEL.WEIGHTS_HEAD = "auto", "strict"
    cfg.OUTPUT_DIR = folder
    Path(folder, "config.yaml").write_text(cfg.dump())
    return path
