"""Tests for networks and training on a CUDA GPU, run by `make test-gpu`."""

import copy
import math
from unittest import mock

import pytest
import torch

from senet_transfer import create_backbone
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.shapes.class_folders import make_shape_classes
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from senet_transfer.layers.fused import launch
from senet_transfer.layers.fused.functions import set_fused

DEVICE = "cuda"

pytestmark = pytest.mark.gpu

half_precision = pytest.mark.parametrize("amp", ["False", "True"], ids=["float32", "AMP"])


def outputs_and_gradients(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a backbone's feature maps and parameter gradients, copied to the CPU.

    The loss is the sum of the mean squares of all feature maps.
    """
    features = model(images)
    sum(feature.square().mean() for feature in features.values()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: gradient for name, gradient in found.items() if gradient is not None}
    return {name: tensor.detach().cpu() for name, tensor in {**features, **found}.items()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("name", ["se_resnet18", "se_resnet50", "se_mobilenet"])
def test_features_and_gradients_equal_those_of_the_cpu(name, norm, layout):
    """Compare the features and gradients of a backbone on the GPU and on the CPU, in float64.

    In float64, the backbone uses PyTorch's operators instead of the fused kernels.
    """
    torch.manual_seed(0)
    stages = ["res2", "res3", "res4", "res5"]
    on_cpu = create_backbone(name, out_features=stages, norm=norm).double()
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE, memory_format=layout)
    images = torch.randn(2, 3, 96, 64, dtype=torch.double)
    expected = outputs_and_gradients(on_cpu, images)
    found = outputs_and_gradients(on_gpu, images.to(DEVICE, memory_format=layout))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("se_resnet18", "BN"),
        ("se_resnet50", "BN"),
        ("se_resnet50", "FrozenBN"),
        ("se_cifar_resnet20", "BN"),
    ],
)
def test_fused_features_and_gradients_equal_those_of_the_cpu(name, norm, layout):
    """Compare the rounding errors of the fused kernels with those of PyTorch's operators.

    The rounding errors in float32 are measured against a float64 computation on the CPU.
    """
    torch.manual_seed(0)
    # Open gates would hide errors, because they hardly depend on their input.
    net = create_backbone(name, norm=norm, se_init="random")
    images = torch.randn(4, 3, 96, 64)
    exact = outputs_and_gradients(copy.deepcopy(net).double(), images.double())
    errors = {}
    for option in (False, "auto"):
        on_gpu = copy.deepcopy(net).to(DEVICE, memory_format=layout)
        set_fused(on_gpu, option)
        with (
            mock.patch.object(launch, "_launch", wraps=launch._launch) as launches,
            torch.backends.cudnn.flags(allow_tf32=False),
        ):
            found = outputs_and_gradients(on_gpu, images.to(DEVICE, memory_format=layout))
        kernels = {call.args[0].__name__ for call in launches.call_args_list}
        both_passes = {"hidden_units", "apply", "gate_backward", "input_gradient"}
        assert kernels >= both_passes if option else not kernels
        assert found.keys() == exact.keys()
        errors[option] = [
            max(relative_error(found[key], exact[key]) for key in exact if ("." in key) == gradient)
            for gradient in (False, True)
        ]
    print(f"relative errors of features and gradients: {errors}")
    # A rounding error can change the sign of a ReLU's input, which changes gradients by up to 1e-2.
    for own, other, rounding in zip(errors["auto"], errors[False], (1e-5, 3e-2), strict=True):
        assert own <= rounding + 3 * other


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def losses(trainer: Trainer) -> list[float]:
    return [value for value, _ in trainer.storage.history("total_loss").values()]


@half_precision
def test_a_detector_trains_is_evaluated_and_resumes(command, tmp_path, amp):
    options = {"MODEL.DEVICE": DEVICE, "SOLVER.AMP.ENABLED": amp, "SOLVER.STEPS": "()"}
    trainer = Trainer(setup(command(**options, **{"SOLVER.MAX_ITER": "3"})))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == DEVICE
    assert all(map(math.isfinite, losses(trainer)))
    assert "bbox" in trainer.results

    trainer = Trainer(setup(command("--resume", **options, **{"SOLVER.MAX_ITER": "4"})))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 3
    trainer.train()
    assert (tmp_path / "run" / "model_final.pth").is_file()


@half_precision
def test_a_detector_trains_with_a_captured_backbone(command, amp):
    options = {"MODEL.DEVICE": DEVICE, "SOLVER.AMP.ENABLED": amp, "SOLVER.STEPS": "()"}
    options |= {"SOLVER.COMPILE": "graph", "MODEL.CHANNELS_LAST": "True"}
    # All images have the same size. The backbone is captured for this size in the third step.
    options |= {"INPUT.SIZE_DIVISIBILITY": "96", "SOLVER.MAX_ITER": "6"}
    trainer = Trainer(setup(command(**options)))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))
    assert "bbox" in trainer.results


@pytest.mark.parametrize("compiled", ["none", "graph"])
@half_precision
def test_a_classifier_trains_and_is_evaluated(shapes, tmp_path, amp, compiled):
    name = make_shape_classes(shapes, tmp_path / "classes")
    words = ["--config-file", "configs/instant/places365_se_r152.yaml"]
    words += ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    words += ["MODEL.RESNETS.DEPTH", "50", "MODEL.DEVICE", DEVICE, "SOLVER.AMP.ENABLED", amp]
    words += ["SOLVER.COMPILE", compiled, "SOLVER.MAX_ITER", "6"]
    words += ["OUTPUT_DIR", str(tmp_path / "run")]
    trainer = Trainer(setup(run_options(argument_parser().parse_args(words))))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == DEVICE
    assert all(map(math.isfinite, losses(trainer)))
    assert "classification" in trainer.results
