"""Tests that compare deployed networks and exported files with the eager networks."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from senet_transfer import UserError, create_backbone, create_classifier, list_models, load
from senet_transfer.config.load import load_config
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.model_from import find_model
from senet_transfer.export import deploy, export_detector, export_network, formats
from senet_transfer.export.write import export_model
from senet_transfer.models.image_classifier import ImageClassifier, wrap_classifier
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.private_api import open_compiled

ROOT = Path(__file__).parents[2]
STAGES = ["res2", "res3", "res4", "res5"]


def randomised(model: nn.Module) -> nn.Module:
    """Set norm and gate tensors to random values, and return the model in evaluation mode."""
    torch.manual_seed(0)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "norm.weight", "norm.bias", "fc2.weight")):
            tensor.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.1)
    return model.eval()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize(
    "name",
    [
        "se_resnet18",
        "se_resnet50",
        "resnet50",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("se_resnext50_32x4d", "senet154", "se_cifar_resnet20")
        ),
    ],
)
@pytest.mark.long
def test_deployed_backbones_compute_the_same_without_norms(name, norm):
    features = ["res2", "res4"] if "cifar" in name else STAGES
    backbone = randomised(create_backbone(name, norm=norm, out_features=features)).double()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    deployed = deploy(backbone)
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    with torch.no_grad():
        expected, found = backbone(x), deployed(x)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-9)
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[key])
    if "cifar" not in name:  # in CIFAR networks, norms precede convolutions and remain
        norms = (nn.BatchNorm2d, FrozenBatchNorm2d)
        assert not any(isinstance(module, norms) for module in deployed.modules())
    assert not any(parameter.requires_grad for parameter in deployed.parameters())


VARIANTS = [
    {},
    {"se_bias": False},
    {"se_excitation": "tanh"},
    {"se_squeeze": "max"},
    {"se_squeeze": "none"},
    {"se_placement": "identity"},
    {"se_placement": "3x3"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.long
def test_a_gate_computed_from_its_convolutions_input_is_unchanged(variant):
    # Compare eager outputs, gradients of the images, compiled outputs, and outputs with autocast.
    narrow = {"width_per_group": 16, "res2_out_channels": 64}
    options = {"out_features": ["res3"], "in_channels": 5, **narrow, **variant}
    backbone = randomised(create_backbone("se_resnet50", **options)).double()
    deployed = deploy(backbone)
    fc1 = deployed.res3[0].se.fc1
    starts_early = variant.get("se_squeeze", "avg") == "avg" and "se_placement" not in variant
    assert (fc1.in_features == 32) == (starts_early or variant.get("se_placement") == "3x3")
    x = torch.randn(2, 5, 64, 96, dtype=torch.double, requires_grad=True)
    expected, found = backbone(x)["res3"], deployed(x)["res3"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (expected, found)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        compiled = torch.compile(deployed, backend="aot_eager", fullgraph=True)
        for run in (deployed, compiled):
            torch.testing.assert_close(run(x)["res3"], expected, rtol=1e-9, atol=1e-9)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [net.float()(x.float())["res3"] - expected for net in (backbone, deployed)]
    assert rounded[1].norm() < 1.5 * rounded[0].norm()


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    model = randomised(create_classifier("se_resnet18", num_classes=7))
    model.linear.weight.data *= 30  # makes the logits of classes differ
    return model


@pytest.mark.parametrize("form", ["onnx", "torch_export", "torchscript"])
@pytest.mark.long
def test_a_saved_classifier_computes_the_same(classifier, tmp_path, form):
    path = tmp_path / f"model{formats.FORMATS[form]}"
    options = {"form": form, "preprocessing": classifier.preprocessing, "size": (64, 48)}
    # export_network compares outputs itself, with a different batch size than for tracing.
    assert 0 < export_network(classifier, path, **options) < 1e-5
    assert path.stat().st_size > 40e6


@pytest.mark.long
def test_exporting_preserves_the_models_device_and_mode(classifier, tmp_path, monkeypatch):
    moved, move = [], nn.Module._apply

    def noted(module, *args, **kwargs):
        moved.append(module)
        return move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "_apply", noted)
    classifier.train()
    options = {"preprocessing": classifier.preprocessing, "size": (64, 48)}
    export_network(classifier, tmp_path / "model.ts", form="torchscript", **options)
    assert classifier.training
    assert moved
    assert not set(moved) & set(classifier.modules())
    classifier.eval()


def with_statistics(model: nn.Module, side: int) -> nn.Module:
    """Compute the running statistics of batch norms from random images, and return the model.

    Arbitrary statistics would amplify rounding errors.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, side, side))
    return model.eval()


# One model per block type. The other models are as deep as in their papers and therefore slow.
SMALL = [
    "se_resnet18",
    "se_resnet50",
    "se_cifar_resnet8",
    "se_bn_inception",
    "se_mobilenet",
    "se_shufflenet_g3",
]


@pytest.mark.parametrize(
    "name",
    [
        *SMALL,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in list_models()
            if name not in SMALL
        ),
    ],
)
@pytest.mark.long
def test_every_classifier_is_exported_as_it_is_built_from_a_config(name, tmp_path):
    # A classifier may have a neck before its linear layer, such as VGG's hidden layers.
    options = ["MODEL.CLASSIFIER.NUM_CLASSES", "7", "MODEL.CLASSIFIER.MIXUP", "0.2"]
    torch.manual_seed(0)
    loaded = find_model(name, options=options).build("cpu")
    # Inception-ResNet needs larger images, because its convolutions are not padded.
    side = 96 if "inception_resnet" in name else min(loaded.preprocessing.crop, 64)
    model = with_statistics(randomised(loaded.model), side)
    path = tmp_path / "model.ts"
    # export_model itself compares the exported file with the eager model.
    export_model(model, loaded.cfg, str(path), size=[side])
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        (found,) = torch.jit.load(str(path))(images.float())
        expected = model({"image": images})
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


class Hidden(nn.Module):
    """Neck with one hidden layer, unlike VGG's neck, which has two."""

    out_channels = 5

    def __init__(self, channels: int, *, dropout: float):
        super().__init__()
        self.fc = nn.Linear(channels, self.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3))).relu()


@pytest.mark.parametrize(
    "form",
    ["onnx", "torch_export", "torchscript", pytest.param("aot_inductor", marks=pytest.mark.slow)],
)
@pytest.mark.long
def test_hidden_layers_are_exported_in_every_format(form, tmp_path):
    backbone = create_backbone("se_cifar_resnet8")
    preprocessing = Preprocessing(resize=32, crop=32)
    model = randomised(
        ImageClassifier(
            backbone=backbone, num_classes=3, preprocessing=preprocessing, neck=Hidden, mixup=0.2
        )
    )
    path = tmp_path / f"model{formats.FORMATS[form]}"
    options = {"form": form, "preprocessing": preprocessing, "size": (32, 32)}
    assert 0 <= export_network(model, path, classes=["a", "b", "c"], **options) < 1e-5
    if form in ("onnx", "torch_export"):
        stored = path.read_bytes()
        assert str(ROOT).encode() not in stored
        assert b"site-packages" not in stored
    if form == "aot_inductor":
        metadata = open_compiled(str(path))[1]
        assert json.loads(metadata["classes"]) == ["a", "b", "c"]
        image = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
        found = load(path)(image)
        with torch.no_grad():
            logits = model({"image": torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)})
        best = logits.softmax(1).max().item()
        assert found.scores[0] == pytest.approx(best, abs=1e-4)


@pytest.mark.long
def test_a_file_with_different_outputs_is_rejected(classifier, tmp_path, monkeypatch):
    def wrong(model: nn.Module) -> nn.Module:
        model = deploy(model)
        model.backbone.res4[0].conv1.bias.data += 0.5
        return model

    monkeypatch.setattr(formats, "deploy", wrong)
    options = {"form": "torchscript", "preprocessing": Preprocessing(), "size": (64, 64)}
    path = tmp_path / "model.ts"
    path.write_bytes(b"earlier")
    with pytest.raises(UserError, match="model.ts does not give the same outputs"):
        export_network(classifier, path, **options)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.long
def test_onnx_without_torch_equals_the_evaluation(classifier, tmp_path):
    # Classify an image file. The top classes must equal those of eval_classifier.py.
    preprocessing = Preprocessing(
        format="BGR", mean=(90.0, 100.0, 110.0), std=(50.0, 60.0, 70.0), resize=72, crop=64
    )
    names = [f"kind {index}" for index in range(7)]
    model, image = tmp_path / "model.onnx", tmp_path / os.fsdecode(b"caf\xe9.png")
    options = {"form": "onnx", "preprocessing": preprocessing, "size": (64, 64)}
    export_network(classifier, model, classes=names, **options)
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 255, (9, 13, 3), dtype=np.uint8))
    coarse.resize((131, 90), Image.Resampling.BICUBIC).save(image)

    classifier.backbone.preprocessing = preprocessing
    view = EvalTransform(resize=72, crop=64)(image.read_bytes())
    with torch.no_grad():
        logits = wrap_classifier(classifier).eval()({"image": view[None]})
    shares, best = logits.softmax(1)[0].sort(descending=True)
    expected = ", ".join(f"kind {i} {s:.1%}" for s, i in zip(shares[:5], best, strict=False))

    script = ROOT / "tools" / "classify_onnx.py"
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = {[str(script), str(model), str(image)]}; runpy.run_path(sys.argv[0], run_name='__main__')"  # noqa: E501
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path}/caf\\udce9.png: {expected}"


@pytest.mark.long
def test_a_traced_detector_finds_the_same_objects(tmp_path):
    cfg = load_config(
        str(ROOT / "configs" / "instant" / "demo_faster_rcnn_se_r18.yaml"),
        ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"],
    )
    torch.manual_seed(0)
    model = randomised(build_model(cfg))
    path = tmp_path / "detector.ts"
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
    assert export_detector(model, path, image) > 10
    extra = {"outputs": ""}
    found = torch.jit.load(str(path), _extra_files=extra)(image)
    assert len(found) == len(json.loads(extra["outputs"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "se_resnet18", "--output", "model.h5"], "expected one of: .onnx, .pt2, .ts"),
        (
            ["--model", "se_resnet18", "--output", "missing/model.ts"],
            "folder missing does not exist",
        ),
        (["--output", "model.ts"], "No model is specified"),
        (
            ["--model", "se_resnet18", "--compile", "--output", "model.onnx"],
            "only .pt2 files can be compiled",
        ),
        (["--model", "se_resnet18", "--size", "0", "--output", "model.ts"], "expected one side"),
        (
            ["--config-file", "configs/faster_rcnn_se_r50.yaml", "--output", "model.pt2"]
            + ["MODEL.WEIGHTS", ""],
            "can only be exported to ONNX and TorchScript",
        ),
    ],
)
@pytest.mark.long
def test_invalid_arguments_are_rejected(arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tools/export.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path("tools/export.py", run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
