"""Benchmarks ``block`` and ``backbone``: training cost of networks with and without SE."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from detectron2.modeling import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn

from benchmark.compare import compare
from benchmark.memory import saved_bytes
from benchmark.report import Amounts, Row
from senet_transfer.models import create_backbone, create_classifier
from senet_transfer.models.backbones.blocks import SEBottleneckBlock

STAGES = ["res2", "res3", "res4", "res5"]

_BLOCKS = {"plain": BottleneckBlock, "plain again": BottleneckBlock, "SE": SEBottleneckBlock}


@dataclass(frozen=True)
class Options:
    """Command-line options for the benchmarks.

    Attributes:
        seconds: Approximate duration of a comparison in seconds.
        device: Device, "cpu" or "cuda".
        profile: True to profile time and memory.
    """

    seconds: float = 20.0
    device: str = "cpu"
    profile: bool = False


def training_step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs a forward and a backward pass.

    The backward pass starts from fixed output gradients to avoid the cost of a loss.
    """
    gradients: list[torch.Tensor] = []

    def step() -> None:
        outputs = _outputs(model(x))
        if not gradients:
            gradients.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.backward(outputs, gradients)

    return step


def _outputs(found: torch.Tensor | dict[str, torch.Tensor]) -> list[torch.Tensor]:
    values = found.values() if isinstance(found, dict) else [found]
    return [value for value in values if value.requires_grad]


def saved(model: nn.Module, x: torch.Tensor) -> float:
    """Return the size, in MB, of the tensors that the forward pass saves for the backward pass."""
    outputs = []
    return saved_bytes(lambda: outputs.append(model(x)), model) / 1e6


def trained(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Return the model in training mode, with nonzero weights in the last layer of each gate.

    These weights are initially zero in gates with ``init="open"``, but not in trained networks.
    """
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("fc2.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model.train().to(device)


def measure_block(options: Options) -> Iterator[Row]:
    """Measure bottleneck blocks: step time, and size of the tensors saved for the backward pass.

    One block of each stage is measured, with BN and with FrozenBN.
    """
    for norm in ("BN", "FrozenBN"):
        for stage, (width, side) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), start=2):
            x = torch.randn(8, 4 * width, side, side, device=options.device, requires_grad=True)
            blocks = {
                name: block(4 * width, 4 * width, bottleneck_channels=width, norm=norm)
                for name, block in _BLOCKS.items()
            }
            steps = {
                name: training_step(trained(block, options.device), x)
                for name, block in blocks.items()
            }
            what = f"Bottleneck in res{stage}, {norm}, batch 8: forward and backward"
            yield compare(
                what,
                steps,
                baseline="plain",
                control="plain again",
                seconds=options.seconds / 2,
                profile=options.profile,
            )
            kept = {name: saved(blocks[name], x) for name in ("plain", "SE")}
            yield Amounts(f"Bottleneck in res{stage}, {norm}: saved memory", "MB", "plain", kept)


def detection_backbone(name: str, device: str = "cpu", fused: str | bool = "auto") -> FPN:
    """Build an R50-FPN backbone with frozen norms, stem and res2."""
    backbone = create_backbone(name, out_features=STAGES, norm="FrozenBN", freeze_at=2, fused=fused)
    fpn = FPN(backbone, STAGES, 256, top_block=LastLevelMaxPool())
    return trained(fpn, device)


def measure_backbone(options: Options) -> Iterator[Row]:
    """Measure detection backbones: step time, and size of the tensors saved for the backward pass.

    The size of the saved tensors is also measured for classifiers.
    """
    images = torch.randn(2, 3, 320, 480, device=options.device)
    names = {"plain": "resnet50", "plain again": "resnet50", "SE": "se_resnet50"}
    backbones = {key: detection_backbone(name, options.device) for key, name in names.items()}
    yield compare(
        "FPN backbone for detection, frozen norms, 2 x 320x480: forward and backward",
        {name: training_step(backbone, images) for name, backbone in backbones.items()},
        baseline="plain",
        control="plain again",
        seconds=options.seconds,
        profile=options.profile,
    )
    kept = {name: saved(backbones[name], images) for name in ("plain", "SE")}
    yield Amounts("FPN backbone for detection, frozen norms: saved memory", "MB", "plain", kept)
    images = torch.randn(4, 3, 224, 224, device=options.device)
    kept = {
        name: saved(trained(create_classifier(names[name]), options.device), images)
        for name in ("plain", "SE")
    }
    yield Amounts("Classifier, trained norms, batch 4, 224 px: saved memory", "MB", "plain", kept)
