"""Tests for every registered model: in bfloat16, exported and compiled."""

import pytest
import torch
from torch import Tensor, nn

from senet_transfer import create_classifier, list_models
from senet_transfer.models.registry import model_entry

SMALL = [
    "se_resnet18",
    "se_cifar_resnet8",
    "se_bn_inception",
    "se_mobilenet",
    "se_shufflenet_g3",
]
# One model of each family that is slow to trace.
LARGE = [
    "se_vgg16_bn",
    "se_resnext50_32x4d",
    "se_inception_resnet_v2",
    "se_wrn16_8",
    "se_shake_shake26_2x96d",
    "se_shake_even29_2x4x64d",
    "senet154",
]


def model_and_images(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = create_classifier(name, num_classes=64).eval()
    side = 8 if model_entry(name).preprocessing.crop == 32 else 64
    # Inception-ResNet needs larger images, because its convolutions are not padded.
    side = 96 if "inception_resnet" in name else side
    return model, torch.randn(2, 3, side, side)


def in_bf16(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        with torch.enable_grad():
            loss = model.train()(x).float().square().mean()
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.99
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def exported(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    found = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(found, expected)


def compiled(model: nn.Module, x: Tensor, expected: Tensor, backend: str = "aot_eager") -> None:
    torch.compiler.reset()
    found = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)


def inductor(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    compiled(model, x, expected, "inductor")


WAYS = {"bf16": in_bf16, "export": exported, "aot_eager": compiled, "inductor": inductor}


def _cases() -> list:
    names = [*list_models(), "se_cifar_resnet8"]
    # Most networks are deep and slow to trace. The small ones have the same blocks. Compilation
    # starts with the same trace as an export, so the slowest small network is only exported.
    fast = {(name, way) for name in SMALL for way in ("bf16", "export", "aot_eager")}
    fast.remove(("se_bn_inception", "aot_eager"))
    cases = [
        pytest.param(name, way, marks=() if (name, way) in fast else pytest.mark.slow)
        for way in ("bf16", "export", "aot_eager")
        for name in names
    ]
    one_a_family = [*SMALL, *LARGE]
    return [
        *cases,
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in one_a_family),
    ]


@pytest.mark.parametrize(("name", "way"), _cases())
@pytest.mark.long
def test_every_model_computes_the_same_in_all_modes(name, way):
    model, x = model_and_images(name)
    if way != "bf16":
        # Compare in float64: operations may run in a different order, and the feature maps of deep
        # untrained backbones have values in the thousands, so float32 would hide errors.
        model, x = model.double(), x.double()
    with torch.no_grad():
        WAYS[way](model, x, model(x))
