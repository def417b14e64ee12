"""Tests for setting a config's layer options and preprocessing to those of its weight file."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from senet_transfer import (
    UserError,
    apply_file_geometry,
    create_backbone,
    load_weights,
    save_weights,
)
from tests.weights import published
from tests.weights.caffe_networks import places_resnet, senet
from tests.weights.detectors import config, first_losses
from tests.weights.peers import peer, randomise, save

RGB = ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
ONES = [1.0, 1.0, 1.0]


def _caffe(net, folder):
    net.write(folder / "net.prototxt", folder / "net.caffemodel")
    return folder / "net.caffemodel"


def _places365(folder):
    model = randomise(published.PlainClassifier(18, classes=365))
    return save(model, folder / "places365.pth")


def _own(folder):
    """Save this project's SE-ResNet-50, built with the SENet authors' strides and stem pooling."""
    backbone = randomise(create_backbone("se_resnet50", stem_pool="ceil", stride_in_1x1=True))
    save_weights(backbone, folder / "own.safetensors")
    return folder / "own.safetensors"


def _msra(write, folder):
    return write(randomise(published.PlainClassifier(50, stride_in_1x1=True)), folder / "R-50.pkl")


# Family: (function that writes a file, (this project's model, stride in the 1x1 convolution, stem
# pool, (channel order, mean, std))).
FILES = {
    "caffe": (
        lambda folder: _caffe(senet("SE-ResNet-50"), folder),
        ("se_resnet50", True, "ceil", ("BGR", [104.0, 117.0, 123.0], ONES)),
    ),
    "caffe-resnext": (
        lambda folder: _caffe(senet("SE-ResNeXt-50"), folder),
        ("se_resnext50_32x4d", False, "ceil", ("BGR", [104.0, 117.0, 123.0], ONES)),
    ),
    "places365_caffe": (
        lambda folder: _caffe(places_resnet((3, 4, 6, 3)), folder),
        ("resnet50", True, "ceil", ("BGR", [104.007, 116.669, 122.679], ONES)),
    ),
    "cadene": (
        lambda folder: save(peer("pretrainedmodels", "se_resnet50"), folder / "peer.pth"),
        ("se_resnet50", True, "ceil", RGB),
    ),
    "timm_legacy": (
        lambda folder: save(peer("timm", "legacy_seresnet18"), folder / "peer.pth"),
        ("se_resnet18", None, "ceil", RGB),
    ),
    "timm": (
        lambda folder: save(peer("timm", "seresnet18"), folder / "peer.pth"),
        ("se_resnet18", None, "pad", RGB),
    ),
    "torchvision_v1": (
        lambda folder: save(peer("torchvision", "resnet50"), folder / "peer.pth"),
        ("resnet50", False, "pad", RGB),
    ),
    "places365": (_places365, ("resnet18", None, "pad", RGB)),
    "moskomule": (
        lambda folder: save(randomise(published.moskomule(18)), folder / "peer.pkl"),
        ("se_resnet18", None, "pad", RGB),
    ),
    "mmpretrain": (
        lambda folder: save(randomise(published.MMClassifier(50, se=True)), folder / "mm.pth"),
        ("se_resnet50", False, "pad", RGB),
    ),
    "detectron1": (
        lambda folder: _msra(published.write_detectron1, folder),
        ("resnet50", True, "pad", ("BGR", [102.9801, 115.9465, 122.7717], ONES)),
    ),
    "detectron2": (
        lambda folder: _msra(published.write_detectron2, folder),
        ("resnet50", True, "pad", ("BGR", [103.53, 116.28, 123.675], ONES)),
    ),
    "senet_transfer": (_own, ("se_resnet50", True, "ceil", RGB)),
}


@pytest.mark.parametrize("family", FILES)
@pytest.mark.long
def test_a_faster_rcnn_built_from_a_file_has_the_familys_geometry(family, tmp_path):
    write, (arch, in_1x1, pool, (order, mean, std)) = FILES[family]
    path = write(tmp_path)
    cfg = config(arch)
    # Set other values, so that every relevant key must change.
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = not in_1x1
    cfg.MODEL.RESNETS.STEM_POOL = "pad" if pool == "ceil" else "ceil"
    cfg.INPUT.FORMAT = "RGB" if order == "BGR" else "BGR"
    cfg.MODEL.WEIGHTS = str(path)
    cfg.freeze()
    changes = {change.key: change.after for change in apply_file_geometry(cfg)}

    assert cfg.is_frozen()
    assert cfg.MODEL.RESNETS.STEM_POOL == changes["MODEL.RESNETS.STEM_POOL"] == pool
    pixels = cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    assert pixels == (order, mean, std)
    if in_1x1 is not None:
        assert bool(cfg.MODEL.RESNETS.STRIDE_IN_1X1) is in_1x1
    assert apply_file_geometry(cfg) == []

    torch.manual_seed(0)
    model = build_model(cfg)
    report = load_weights(model, path)
    assert report.family == family.split("-")[0]
    losses = first_losses(cfg, model)
    assert all(math.isfinite(loss) for loss in losses.values()), losses


@pytest.mark.long
def test_changes_are_logged_as_a_table(tmp_path, caplog):
    caplog.set_level("INFO", "senet_transfer")
    cfg = config("resnet18")
    cfg.MODEL.WEIGHTS = str(save(peer("torchvision", "resnet18"), tmp_path / "r18.pth"))
    changes = apply_file_geometry(cfg)
    assert [c.key for c in changes] == ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]
    table = caplog.text.split("Config keys set from")[1]
    for word in ("INPUT.FORMAT", "BGR", "RGB", "103.53", "123.675", "torchvision_v1"):
        assert word in table


@pytest.mark.long
def test_a_pinned_config_does_not_start_from_a_file_that_states_another_geometry(tmp_path):
    cfg = config("se_resnet50")
    cfg.MODEL.WEIGHTS = str(_own(tmp_path))
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    cfg.MODEL.RESNETS.STEM_POOL = "ceil"
    cfg.MODEL.WEIGHTS_PIN = True
    before = cfg.dump()
    with pytest.raises(UserError, match="WEIGHTS_PIN.*(?s:.*)INPUT.FORMAT"):
        apply_file_geometry(cfg)
    assert cfg.dump() == before
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = RGB
    assert apply_file_geometry(cfg) == []


@pytest.mark.long
def test_a_pinned_config_takes_precedence_over_the_names_of_tensors(tmp_path, caplog):
    caplog.set_level("INFO", "senet_transfer")
    cfg = config("resnet18")
    cfg.MODEL.WEIGHTS = str(save(peer("torchvision", "resnet18"), tmp_path / "r18.pth"))
    cfg.MODEL.WEIGHTS_PIN = True
    assert apply_file_geometry(cfg) == []
    assert "format is BGR, as specified by the user, although the tensor names" in caplog.text


@pytest.mark.long
def test_the_given_family_decides_if_names_are_ambiguous(tmp_path):
    # The tensors of this project and of Detectron2's model zoo can have the same names and shapes.
    backbone = randomise(create_backbone("resnet50"))
    torch.save({"model": backbone.state_dict()}, tmp_path / "unmarked.pth")
    cfg = config("resnet50")
    cfg.MODEL.WEIGHTS = str(tmp_path / "unmarked.pth")
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    assert apply_file_geometry(cfg) == []  # the file's stride placement is unknown

    cfg.MODEL.WEIGHTS_FAMILY = "detectron2"
    assert [c.key for c in apply_file_geometry(cfg)] == ["MODEL.RESNETS.STRIDE_IN_1X1"]
    cfg.MODEL.WEIGHTS_FAMILY = "detectron2_torchvision"
    apply_file_geometry(cfg)
    assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert cfg.INPUT.FORMAT == "RGB"


@pytest.mark.long
def test_gates_are_built_as_in_the_file(tmp_path):
    cfg = config("se_resnet18")
    cfg.MODEL.WEIGHTS = str(save(randomise(published.moskomule(18)), tmp_path / "peer.pth"))
    apply_file_geometry(cfg)
    assert cfg.MODEL.SE.BIAS is False
    cfg = config("se_resnet18")
    cfg.MODEL.WEIGHTS = str(save(peer("timm", "seresnet18"), tmp_path / "peer.pth"))
    apply_file_geometry(cfg)
    assert cfg.MODEL.SE.DIVISOR == 8
    cfg.MODEL.WEIGHTS = str(save(peer("timm", "legacy_seresnet18"), tmp_path / "peer.pth"))
    apply_file_geometry(cfg)
    assert cfg.MODEL.SE.DIVISOR == 1
    assert cfg.MODEL.SE.RELU_BEFORE


def test_without_weights_nothing_changes_and_a_missing_file_is_reported():
    cfg = config("resnet18")
    before = cfg.dump()
    assert apply_file_geometry(cfg) == []
    assert cfg.dump() == before
    cfg.MODEL.WEIGHTS = "nowhere/file.pth"
    with pytest.raises(UserError, match="weight file nowhere/file.pth"):
        apply_file_geometry(cfg)
