"""Benchmark of ResNet-50 and SE-ResNet-50 inference as CUDA graphs, compared with timm."""

import copy
from collections.abc import Callable, Iterator

import timm
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from benchmark.gpu.classifier import FUSED, PLAIN, SE, TIMM, TIMM_SE
from benchmark.gpu.measure import Found, Settings, Step, captured, compare_steps, ratio_of
from benchmark.networks import trained
from senet_transfer.export import deploy
from senet_transfer.models import create_classifier

# In all networks, batch norms are folded into the convolutions.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    PLAIN: lambda depth: deploy(trained(create_classifier(f"resnet{depth}", fused=False))),
    "plain again": lambda depth: deploy(trained(create_classifier(f"resnet{depth}", fused=False))),
    FUSED: lambda depth: deploy(trained(create_classifier(f"resnet{depth}"))),
    SE: lambda depth: deploy(trained(create_classifier(f"se_resnet{depth}"))),
    TIMM: lambda depth: _folded(trained(timm.create_model(f"resnet{depth}"))),
    TIMM_SE: lambda depth: _folded(trained(timm.create_model(f"seresnet{depth}"))),
}


def _folded(model: nn.Module) -> nn.Module:
    return fuse(copy.deepcopy(model).eval())


def _forward(model: nn.Module, images: torch.Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            model(images)

    return step


def measure_inference(settings: Settings) -> Iterator[Found]:
    """Measure inference in float16 with batches of 1 and 64 images."""
    dtype = settings.sized(torch.float16, torch.float32)
    last = torch.channels_last
    models = {
        name: build(settings.sized(50, 18)).eval().to(settings.device, dtype, memory_format=last)
        for name, build in NETWORKS.items()
    }
    side = settings.sized(224, 32)
    for batch in (1, 64):
        shape = (settings.sized(batch, min(batch, 2)), 3, side, side)
        images = torch.randn(shape, device=settings.device, dtype=dtype).to(memory_format=last)
        steps = {name: captured(_forward(model, images)) for name, model in models.items()}
        found = compare_steps(
            settings,
            f"Inference, float16, deployed, as a CUDA graph, batch size {batch}",
            steps,
            seconds=3,
            calls=20 if batch == 1 else 5,
            pairs=[(SE, FUSED), (SE, TIMM_SE), (PLAIN, TIMM)],
        )
        yield (
            found,
            {
                f"inference_{batch}": ratio_of(found, SE),
                f"inference_timm_{batch}": ratio_of(found, SE, TIMM_SE),
            },
        )
