"""Tests that weights converted between packages give the same outputs in both packages."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from safetensors import safe_open
from safetensors.torch import load_file

from senet_transfer import UserError, create_backbone, create_classifier, save_weights
from senet_transfer.export import conversion as engine_convert
from senet_transfer.export.conversion import convert_file
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.weights.convert import FORMATS, MADE_FROM, family_of
from senet_transfer.weights.families.registry import FAMILIES
from senet_transfer.weights.formats.reader import read_tensors
from senet_transfer.weights.mapping.source import examine
from tests.weights import published
from tests.weights.detectors import detector
from tests.weights.peers import (
    images,
    outputs_of_ours,
    outputs_of_peer,
    peer,
    randomise,
    save,
    worst,
)

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("zero_initial_weights")

# Package, its model name, this project's model name, target format and file suffix.
ROUND_TRIPS = [
    ("torchvision", "resnet18", "resnet18", "torchvision", ".pth"),
    ("torchvision", "resnet18", "resnet18", "torchvision", ".safetensors"),
    ("timm", "resnet18", "resnet18", "timm", ".safetensors"),
    ("timm", "seresnet18", "se_resnet18", "timm", ".pth"),
    ("timm", "legacy_seresnet18", "se_resnet18", "timm_legacy", ".safetensors"),
    ("pretrainedmodels", "se_resnet50", "se_resnet50", "cadene", ".pth"),
]
SLOW_ROUND_TRIPS = [
    ("torchvision", "resnext50_32x4d", "resnext50_32x4d", "torchvision", ".safetensors"),
    ("timm", "seresnet50", "se_resnet50", "timm", ".safetensors"),
    ("timm", "legacy_seresnext50_32x4d", "se_resnext50_32x4d", "timm_legacy", ".pth"),
    ("timm", "senet154", "senet154", "timm", ".pth"),
    ("pretrainedmodels", "senet154", "senet154", "cadene", ".safetensors"),
]


def _again(package, name):
    """Build the same network as ``peer(package, name)``, but with different random weights."""
    return peer(package, name, seed=7)


@pytest.mark.parametrize(
    ("package", "theirs", "ours", "to", "suffix"),
    [*ROUND_TRIPS, *(pytest.param(*case, marks=slow) for case in SLOW_ROUND_TRIPS)],
)
@pytest.mark.long
def test_round_trip_conversion_loads_strictly_in_the_other_library(
    package, theirs, ours, to, suffix, tmp_path
):
    model = peer(package, theirs)
    path = save(model, tmp_path / "peer.pth")
    own, back = tmp_path / f"own{suffix}", tmp_path / f"back{suffix}"
    assert convert_file(path, own, family=FORMATS[to].family, check=True).relative == 0
    expected = outputs_of_peer(model, images())
    mine = create_classifier(ours, weights=own).eval()
    assert worst(expected, outputs_of_ours(mine, images())) < 1e-5

    assert convert_file(own, back, to=to, check=True).relative == 0
    other = _again(package, theirs)
    state = torch.load(back, weights_only=True) if suffix == ".pth" else load_file(back)
    other.load_state_dict(state, strict=True)
    assert worst(expected, outputs_of_peer(other, images())) < 1e-5
    assert state.keys() == model.state_dict().keys()


@pytest.mark.long
def test_a_round_trip_to_mmpretrain_is_exact(tmp_path):
    model = randomise(published.MMClassifier(50, se=True))
    path = save(model, tmp_path / "mm.pth")
    convert_file(path, tmp_path / "own.pth")
    convert_file(tmp_path / "own.pth", tmp_path / "back.pth", to="mmpretrain", check=True)
    again = randomise(published.MMClassifier(50, se=True), seed=7)
    again.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    assert torch.equal(model(images()), again(images()))


@pytest.mark.parametrize("name", FORMATS)
def test_every_converted_name_is_read_back_as_the_original(name):
    form = FORMATS[name]
    family = FAMILIES[form.family]
    for network in sorted(form.networks & {"resnet18", "se_resnet18", "se_resnet50", "senet154"}):
        with torch.device("meta"):
            tensors = create_classifier(network).state_dict()
        ours = [tensor.removeprefix("backbone.") for tensor in tensors]
        deep = form.rename_deep and "stem.conv3.weight" in ours
        theirs = [(form.rename_deep if deep else form.rename)(tensor) for tensor in ours]
        assert list(family.renamed(theirs).values()) == ours


def _detectron2_backbone(stride_in_1x1):
    """Build Detectron2's ResNet-50 with a classifier."""
    stages = ResNet.make_default_stages(50, BottleneckBlock, stride_in_1x1=stride_in_1x1)
    return ResNet(BasicStem(norm="BN"), stages, num_classes=1000)


@pytest.mark.parametrize("to", ["pkl", "own and pkl"])
@pytest.mark.long
def test_detectron2_loads_a_pkl_without_missing_tensors(to, tmp_path):
    model = peer("torchvision", "resnet50")
    path = save(model, tmp_path / "r50.pth")
    if to == "own and pkl":
        path = tmp_path / "own.safetensors"
        convert_file(tmp_path / "r50.pth", path)
    pkl = tmp_path / "R-50.pkl"
    assert convert_file(path, pkl, check=True).relative == 0

    theirs = _detectron2_backbone(stride_in_1x1=False)
    found = []
    checkpointer = DetectionCheckpointer(theirs)
    checkpointer._log_incompatible_keys = found.append
    checkpointer.load(str(pkl))
    assert all(not (i.missing_keys or i.unexpected_keys or i.incorrect_shapes) for i in found)
    with torch.no_grad():
        result = theirs.eval()(images())["linear"]
    assert worst({"logits": outputs_of_peer(model, images())["logits"]}, {"logits": result}) < 1e-5
    assert pickle.loads(pkl.read_bytes())["matching_heuristics"] is True


@pytest.mark.long
def test_detectron2s_loader_loads_a_pkl_into_a_detectors_backbone(tmp_path):
    path = save(peer("timm", "legacy_seresnet18"), tmp_path / "x.pth")
    convert_file(path, tmp_path / "x.pkl", family="timm_legacy")
    model = detector("se_resnet18", STEM_POOL="ceil")
    DetectionCheckpointer(model).load(str(tmp_path / "x.pkl"))
    backbone = create_backbone("se_resnet18", weights=path, family="timm_legacy").state_dict()
    state = model.backbone.bottom_up.state_dict()
    for name, tensor in backbone.items():
        if "num_batches" not in name:
            assert torch.equal(state[name], tensor), name


@pytest.mark.long
def test_a_complete_detector_is_converted_with_its_heads(tmp_path):
    model = detector("se_resnet18")
    save_weights(model, tmp_path / "whole.pth")
    comparison = convert_file(tmp_path / "whole.pth", tmp_path / "whole.pkl", check=True)
    assert (comparison.of, comparison.absolute) == ("tensors", 0)
    again = detector("se_resnet18", seed=1)
    DetectionCheckpointer(again).load(str(tmp_path / "whole.pkl"))
    state = again.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="contains a detector"):
        convert_file(tmp_path / "whole.pth", tmp_path / "t.pth", to="timm_legacy")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.long
def test_converted_files_contain_the_metadata(suffix, tmp_path):
    path = save(peer("timm", "legacy_seresnet18"), tmp_path / "x.pth")
    out = tmp_path / f"out{suffix}"
    convert_file(path, out, family="timm_legacy")
    word = read_tensors(out).metadata["senet_transfer"]
    assert word["source"] == {"family": "timm_legacy", "file": "x.pth", "sha256": file_sha256(path)}
    assert word["model"] == "se_resnet18"
    source = examine(out)
    assert source.family.name == "senet_transfer"
    expected = examine(path, "timm_legacy")
    assert source.geometry == expected.geometry
    assert source.preprocessing == expected.preprocessing
    assert "sha256" in read_tensors(out).verified


@pytest.mark.long
def test_converted_files_of_other_projects_contain_the_origin(tmp_path):
    path = save(peer("torchvision", "resnet18"), tmp_path / "x.pth")
    for suffix in (".pth", ".safetensors"):
        convert_file(path, tmp_path / f"tv{suffix}", to="torchvision")
    state = torch.load(tmp_path / "tv.pth", weights_only=True)
    assert state._metadata[MADE_FROM]["source"]["sha256"] == file_sha256(path)
    with safe_open(tmp_path / "tv.safetensors", "pt") as file:
        origin = json.loads(file.metadata()[MADE_FROM])
    assert origin["source"]["family"] == "torchvision_v1"


@pytest.mark.parametrize(
    ("ours", "options", "to", "words"),
    [
        (
            "se_resnet18",
            {},
            "torchvision",
            "network is se_resnet18, but torchvision supports only resnet101",
        ),
        ("resnet18", {"stem_pool": "ceil"}, "timm", "stem_pool is 'ceil' in the file, but 'pad'"),
        ("resnet50", {"stride_in_1x1": True}, "torchvision", "stride_in_1x1 is True in the file"),
        ("se_resnet18", {}, "timm", r"\(\(2, 3, 4, 5\), 16, 1, True\) in the file, .*16, 8, True"),
        ("se_resnet18", {"stem_pool": "ceil"}, "timm_legacy", "se_relu_before is False"),
        ("se_resnet50", {}, "cadene", "stride_in_1x1 is False.*\n.*stem_pool is 'pad'"),
        ("se_resnet50", {"se_bias": False}, "timm", "biases"),
        ("se_resnet18", {}, "cadene", "network is se_resnet18"),
    ],
)
@pytest.mark.long
def test_features_that_the_other_project_lacks_are_rejected(ours, options, to, words, tmp_path):
    # All tensors fit in each of these cases, so only the checks can detect the difference.
    save_weights(create_classifier(ours, **options), tmp_path / "own.pth")
    with pytest.raises(UserError, match=words):
        convert_file(tmp_path / "own.pth", tmp_path / "out.pth", to=to)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.long
def test_preprocessing_that_the_other_project_lacks_is_rejected(tmp_path):
    model = randomise(published.PlainClassifier(18))
    path = published_bgr(model, tmp_path)
    with pytest.raises(UserError, match="format is BGR for the file's network and RGB"):
        convert_file(path, tmp_path / "out.pth", to="torchvision")


def published_bgr(model, tmp_path) -> Path:
    """Save a model to a weight file whose metadata specifies BGR images."""
    path = save(model, tmp_path / "tv.pth")
    ours = create_classifier("resnet18", weights=path)
    ours.backbone.preprocessing = Preprocessing(format="BGR")
    save_weights(ours, tmp_path / "bgr.pth")
    return tmp_path / "bgr.pth"


@pytest.mark.long
def test_a_file_without_metadata_is_not_detected_as_another_projects(tmp_path):
    torch.save(create_classifier("resnet18").state_dict(), tmp_path / "bare.pth")
    with pytest.raises(
        UserError, match="stem_pool is not specified.*\n.*does not specify the preprocessing"
    ):
        convert_file(tmp_path / "bare.pth", tmp_path / "out.pth", to="timm")


@pytest.mark.long
def test_a_file_with_missing_tensors_is_rejected_before_writing(tmp_path):
    state = peer("torchvision", "resnet18").state_dict()
    del state["layer4.1.bn2.running_var"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="1 missing from the file"):
        convert_file(tmp_path / "x.pth", tmp_path / "out.pth")
    state = {**peer("torchvision", "resnet18").state_dict(), "aux.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="1 unexpected: aux.weight"):
        convert_file(tmp_path / "x.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.long
def test_detectron1s_folded_norms_only_load_into_frozen_norms(tmp_path, caplog):
    caplog.set_level("INFO", "senet_transfer")
    model = randomise(published.PlainClassifier(50, stride_in_1x1=True))
    path = published.write_detectron1(model, tmp_path / "R-50.pkl")
    assert convert_file(path, tmp_path / "r50.safetensors", check=True).relative < 1e-6
    assert "only with FrozenBN" in caplog.text
    backbone = create_classifier("resnet50", weights=tmp_path / "r50.safetensors", norm="FrozenBN")
    outputs = outputs_of_ours(backbone.eval(), images())
    assert worst(outputs_of_peer(model, images()), outputs) < 1e-5


@pytest.mark.long
def test_a_file_is_replaced_only_if_forced_and_atomically(tmp_path, monkeypatch):
    path = save(peer("torchvision", "resnet18"), tmp_path / "x.pth")
    out = tmp_path / "out.pth"
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="out.pth already exists.*--force"):
        convert_file(path, out)
    with pytest.raises(UserError, match="exists"):
        convert_file(path, path)
    before = sorted(tmp_path.iterdir())

    def full(*args, **kwargs):
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="Cannot write .*No space left"):
            convert_file(path, out, force=True)
    assert out.read_bytes() == b"mine"
    assert sorted(tmp_path.iterdir()) == before
    convert_file(path, out, force=True)
    assert examine(out).family.name == "senet_transfer"


@pytest.mark.long
def test_a_check_that_fails_is_an_error_and_keeps_the_existing_file(tmp_path, monkeypatch):
    path = save(peer("torchvision", "resnet18"), tmp_path / "x.pth")
    other = examine(save(peer("torchvision", "resnet18", seed=3), tmp_path / "other.pth"))
    real = engine_convert.examine
    monkeypatch.setattr(
        engine_convert, "examine", lambda p, f: real(p, f) if Path(p).name == "x.pth" else other
    )
    out = tmp_path / "out.pth"
    out.write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        UserError, match="do not give the same outputs as .*largest difference in logits"
    ):
        convert_file(path, out, check=True, force=True)
    assert out.read_bytes() == b"mine"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("out", "to", "words"),
    [
        ("x.bin", None, "have the suffix .pth or .safetensors, not '.bin'"),
        ("x.pth", "detectron2", "have the suffix .pkl, not '.pth'"),
        ("x.pkl", "timm", "have the suffix .pth or .safetensors, not '.pkl'"),
        ("x.pth", "keras", "can't be converted to 'keras'"),
    ],
)
def test_an_invalid_suffix_or_target_is_rejected(out, to, words, tmp_path):
    with pytest.raises(UserError, match=words):
        convert_file("absent.pth", tmp_path / out, to=to)


def test_every_format_is_read_as_a_known_family():
    assert all(family_of(name) in FAMILIES for name in FORMATS)


def test_the_command_line_converts_and_reports_errors(tmp_path, run_python):
    path = save(peer("torchvision", "resnet18"), tmp_path / "x.pth")
    command = ("tools/convert_weights.py", path, tmp_path / "out.safetensors")
    done = run_python(*command, "--check")
    assert done.returncode == 0, done.stderr
    checked = "Checked: largest difference in logits: 0 (0 of the largest value)"
    assert checked in done.stdout
    assert "Detected as" in done.stdout
    quiet = run_python(*command, "--check", "--force", "--quiet")
    assert quiet.returncode == 0
    warning, result = quiet.stdout.splitlines()
    assert "The family torchvision_v1 is assumed" in warning  # torchvision_v2 resizes to 232
    assert result == checked
    again = run_python(*command, "--quiet")
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in again.stderr
