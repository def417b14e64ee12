"""Folded networks and exported files against the eager networks they come from."""

import json
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

from senet_transfer import UserError, create_backbone, create_classifier
from senet_transfer.config.load import load_config
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.export import deploy, export_detector, export_network, formats
from senet_transfer.models.image_classifier import wrap_classifier
from senet_transfer.preprocessing import Preprocessing

ROOT = Path(__file__).parents[2]
STAGES = ["res2", "res3", "res4", "res5"]


def randomised(model: nn.Module) -> nn.Module:
    """With statistics and gates as training leaves them."""
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
def test_deployed_trunks_compute_the_same_without_norms(name, norm):
    features = ["res2", "res4"] if "cifar" in name else STAGES
    trunk = randomised(create_backbone(name, norm=norm, out_features=features)).double()
    before = {key: tensor.clone() for key, tensor in trunk.state_dict().items()}
    deployed = deploy(trunk)
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    with torch.no_grad():
        expected, found = trunk(x), deployed(x)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-9)
    for key, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, before[key])
    if "cifar" not in name:  # Whose norms come before the convolutions.
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
def test_a_gate_that_starts_from_the_input_of_its_convolution_stays_the_same(variant):
    """Whatever reads the folded network: eager, with a gradient to the images, or compiled."""
    options = {"out_features": ["res3"], "in_channels": 5, **variant}
    trunk = randomised(create_backbone("se_resnet50", **options)).double()
    deployed = deploy(trunk)
    fc1 = deployed.res3[0].se.fc1
    starts_early = variant.get("se_squeeze", "avg") == "avg" and "se_placement" not in variant
    assert (fc1.in_features == 128) == (starts_early or variant.get("se_placement") == "3x3")
    x = torch.randn(2, 5, 64, 96, dtype=torch.double, requires_grad=True)
    expected, found = trunk(x)["res3"], deployed(x)["res3"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (expected, found)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        compiled = torch.compile(deployed, backend="aot_eager", fullgraph=True)
        for run in (deployed, compiled):
            torch.testing.assert_close(run(x)["res3"], expected, rtol=1e-9, atol=1e-9)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [net.float()(x.float())["res3"] - expected for net in (trunk, deployed)]
    assert rounded[1].norm() < 1.5 * rounded[0].norm()


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    model = randomised(create_classifier("se_resnet18", num_classes=7))
    model.linear.weight.data *= 30  # Classes that differ.
    return model


@pytest.mark.parametrize("form", ["onnx", "torch_export", "torchscript"])
@pytest.mark.long
def test_a_written_classifier_computes_the_same(classifier, tmp_path, form):
    path = tmp_path / f"model{formats.FORMATS[form]}"
    options = {"form": form, "preprocessing": classifier.preprocessing, "size": (64, 48)}
    # The comparison, on another number of images than it was traced with, is the function's own.
    assert 0 < export_network(classifier, path, **options) < 1e-5
    assert path.stat().st_size > 40e6


def test_a_file_that_computes_something_else_is_refused(classifier, tmp_path, monkeypatch):
    def wrong(model: nn.Module) -> nn.Module:
        model = deploy(model)
        model.backbone.res4[0].conv1.bias.data += 0.5
        return model

    monkeypatch.setattr(formats, "deploy", wrong)
    options = {"form": "torchscript", "preprocessing": Preprocessing(), "size": (64, 64)}
    with pytest.raises(UserError, match="computes something else"):
        export_network(classifier, tmp_path / "model.ts", **options)


@pytest.mark.long
def test_onnx_runs_without_torch_as_the_evaluation_does(classifier, tmp_path):
    """From the file of an image: the example's best classes are those of eval_classifier.py."""
    preprocessing = Preprocessing(
        format="BGR", mean=(90.0, 100.0, 110.0), std=(50.0, 60.0, 70.0), resize=72, crop=64
    )
    names = [f"kind {index}" for index in range(7)]
    model, image = tmp_path / "model.onnx", tmp_path / "image.png"
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{image}: {expected}"


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
        (["--model", "se_resnet18", "--output", "model.h5"], "expected one of .onnx, .pt2, .ts"),
        (["--model", "se_resnet18", "--output", "missing/model.ts"], "There is no folder"),
        (["--output", "model.ts"], "What is the model"),
        (["--model", "se_resnet18", "--size", "0", "--output", "model.ts"], "expected a side"),
        (
            ["--config-file", "configs/faster_rcnn_se_r50.yaml", "--output", "model.onnx"]
            + ["MODEL.WEIGHTS", ""],
            "can be exported as TorchScript",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tools/export.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path("tools/export.py", run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
