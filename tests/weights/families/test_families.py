"""Tests for several weight families, mainly of projects that can't be installed.

The networks of these projects are reimplemented in ``tests/weights/published.py``.
"""

import pickle

import pytest
import torch

from senet_transfer import UserError, create_backbone, create_classifier, load_weights
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights import FAMILIES
from senet_transfer.weights.mapping.source import examine
from tests.weights import published
from tests.weights.peers import check_peer, images, outputs_of_peer, peer, randomise, save, worst


@pytest.mark.parametrize("wrapped", [True, False], ids=["today", "older"])
@pytest.mark.long
def test_mmpretrain_in_both_formats(wrapped, tmp_path):
    model = randomise(published.MMClassifier(50, se=True, wrapped=wrapped))
    path = tmp_path / "mm.pth"
    torch.save({"meta": {"epoch": 100}, "state_dict": model.state_dict()}, path)
    stages = [getattr(model.backbone, f"layer{i}") for i in (1, 2, 3, 4)]
    check_peer(model, stages, path, "se_resnet50", "mmpretrain")


@pytest.mark.long
def test_mmpretrain_without_se_and_with_only_the_backbone(tmp_path):
    model = randomise(published.MMClassifier(18, se=False))
    stages = [getattr(model.backbone, f"layer{i}") for i in (1, 2, 3, 4)]
    check_peer(model, stages, save(model, tmp_path / "mm.pth"), "resnet18", "mmpretrain")

    with_se = randomise(published.MMClassifier(50, se=True)).backbone
    path = save(with_se, tmp_path / "backbone.pth")
    assert examine(path).family.name == "mmpretrain"
    backbone = create_backbone("se_resnet50", weights=path).eval()
    torch.testing.assert_close(backbone(images())["res5"], with_se(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_moskomule_with_gates_without_biases(tmp_path):
    model = randomise(published.moskomule(18))
    path = save(model, tmp_path / "seresnet.pkl")
    created = check_peer(model, None, path, "se_resnet18", "moskomule")
    assert created.backbone.res2[0].se.fc1.bias is None


@pytest.mark.long
def test_gates_with_and_without_biases_are_incompatible(tmp_path):
    # Without this check, biases would be dropped or remain random.
    bias_free = save(randomise(published.moskomule(18)), tmp_path / "free.pth")
    biased = save(peer("timm", "legacy_seresnet18"), tmp_path / "biased.pth")
    with pytest.raises(UserError, match="have no biases, but the model's do.*se_bias=False"):
        load_weights(create_backbone("se_resnet18"), bias_free)
    options = {"stem_pool": "ceil", "se_relu_before": True, "se_bias": False}
    with pytest.raises(UserError, match="have biases, but the model's do not.*se_bias=True"):
        load_weights(create_backbone("se_resnet18", **options), biased)
    with pytest.raises(UserError, match="se_bias=False contradicts"):
        create_backbone("se_resnet18", weights=biased, se_bias=False)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.long
def test_places365_of_csail(depth, tmp_path):
    # CSAIL saved the networks with DataParallel. They have 365 classes.
    model = randomise(published.PlainClassifier(depth, classes=365))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "places365.pth.tar"
    torch.save({"epoch": 90, "arch": f"resnet{depth}", "state_dict": state}, path)
    check_peer(model, None, path, f"resnet{depth}", "places365", num_classes=365)


@pytest.mark.long
def test_a_file_of_python_2_without_counters(tmp_path):
    # The Places files were saved by Python 2 and a version of PyTorch without num_batches_tracked.
    model = randomise(published.PlainClassifier(18, classes=365))
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    path = tmp_path / "old.pth.tar"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        path,
        pickle_protocol=2,
        _use_new_zipfile_serialization=False,
    )
    check_peer(model, None, path, "resnet18", "places365", num_classes=365)


@pytest.mark.long
def test_detectron2_has_its_stride_in_the_1x1(tmp_path):
    model = randomise(published.PlainClassifier(50, stride_in_1x1=True))
    path = published.write_detectron2(model, tmp_path / "R-50.pkl")
    created = check_peer(model, None, path, "resnet50", "detectron2")
    assert created.preprocessing.format == "BGR"
    assert created.preprocessing.mean == (103.53, 116.28, 123.675)
    assert created.preprocessing.std == (1.0, 1.0, 1.0)


@pytest.mark.long
def test_detectron1_only_loads_into_frozen_norms(tmp_path):
    model = randomise(published.PlainClassifier(50, stride_in_1x1=True))
    path = published.write_detectron1(model, tmp_path / "R-50.pkl")
    created = check_peer(model, None, path, "resnet50", "detectron1", norm="FrozenBN")
    assert created.preprocessing.mean == (102.9801, 115.9465, 122.7717)
    with pytest.raises(UserError, match="batch norms without running statistics.*FrozenBN"):
        create_classifier("resnet50", weights=path)


@pytest.mark.long
def test_torchvision_weights_converted_by_detectron2(tmp_path):
    # The names are Detectron2's. Only `__author__` shows that the strides are torchvision's.
    model = peer("torchvision", "resnet50")
    renamed = {}
    for name, tensor in model.state_dict().items():
        for i in (1, 2, 3, 4):
            name = name.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        if not name.startswith(("res", "fc")):
            name = f"stem.{name}"
        if not name.startswith("fc") and "num_batches" not in name:
            renamed[name] = tensor.numpy()
    path = tmp_path / "r50.pkl"
    author = {"__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps({"model": renamed, **author}))
    source = examine(path)
    assert source.family.name == "detectron2_torchvision"
    backbone = create_backbone("resnet50", weights=path).eval()
    x = images()
    expected = outputs_of_peer(model, x)["res5"]
    assert worst({"res5": expected}, {"res5": backbone(x)["res5"].detach()}) < 1e-5
    assert backbone.preprocessing.format == "RGB"


@pytest.mark.long
def test_families_with_the_same_names_are_logged_and_can_be_chosen(tmp_path, caplog):
    path = save(peer("torchvision", "resnet18"), tmp_path / "r18.pth")
    caplog.set_level("INFO", "senet_transfer")
    model = create_classifier("resnet18", weights=path)
    assert model.preprocessing == Preprocessing()
    assert "torchvision_v2" in caplog.text
    assert "with resize 232" in caplog.text
    assert "with interpolation bicubic" in caplog.text
    assert (
        create_classifier("resnet18", weights=path, family="torchvision_v2").preprocessing.resize
        == 232
    )
    timm = create_classifier("resnet18", weights=path, family="timm")
    assert timm.preprocessing.interpolation == "bicubic"


@pytest.mark.long
def test_a_family_that_contradicts_the_file_is_rejected(tmp_path):
    path = save(peer("torchvision", "resnet18"), tmp_path / "r18.pth")
    with pytest.raises(UserError, match="not belong to the weight family cadene.*torchvision_v1"):
        load_weights(create_backbone("resnet18"), path, family="cadene")
    with pytest.raises(UserError, match="The weight family is 'tochvision'"):
        load_weights(create_backbone("resnet18"), path, family="tochvision")
    with pytest.raises(UserError, match="no weights are given"):
        create_backbone("resnet18", family="cadene")


def test_a_network_of_an_unknown_family_is_rejected(tmp_path):
    path = save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), tmp_path / "other.pth")
    with pytest.raises(UserError, match="match no known weight family"):
        load_weights(create_backbone("resnet18"), path)


@pytest.mark.long
def test_timm_rounds_hidden_widths_and_the_model_supports_it(tmp_path):
    # In res2, timm's SE-ResNet-18 has 8 hidden units instead of C / 16 = 4.
    path = save(peer("timm", "seresnet18"), tmp_path / "timm.pth")
    model = create_backbone("se_resnet18", weights=path)
    assert [stage[0].se.fc1.out_features for stage in model.stages] == [8, 8, 16, 32]
    with pytest.raises(UserError, match="divisor 8"):
        load_weights(create_backbone("se_resnet18"), path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_detected_by_its_own_name(name):
    assert FAMILIES[name].name == name
    assert FAMILIES[name].title
