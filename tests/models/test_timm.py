"""Tests that compare backbones and classifiers built from timm's networks with timm itself."""

import re
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file

from senet_transfer import (
    UserError,
    create_backbone,
    create_classifier,
    list_models,
    load_weights,
    save_weights,
)
from senet_transfer.analysis.complexity.count import measure
from senet_transfer.analysis.excitations.gates import capture_gates, gates_of
from senet_transfer.config.load import load_config
from senet_transfer.engine.model_from import find_model, model_config
from senet_transfer.weights.hub import timm_networks
from senet_transfer.weights.mapping.source import examine
from tests.engine.conftest import SMALL
from tests.weights.layouts import prefixed
from tests.weights.peers import STAGES, peer, randomise

# Small networks: some from families with SE layers, and two without.
NETWORKS = (
    "resnet10t",
    "regnety_002",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "test_convnext",
)
WITH_SE = ("seresnet18", "regnety_002", "test_efficientnet", "mobilenetv3_small_050")


@pytest.fixture(autouse=True)
def timm():
    """Import timm, which takes a second, or skip the test if it is not installed."""
    return pytest.importorskip("timm")


@pytest.fixture
def state_dict(tmp_path):
    """Return a function that saves a timm network to a weight file, with timm's tensor names."""

    def write(network, suffix=".safetensors", **extra):
        path = tmp_path / f"weights{suffix}"
        tensors = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
        if suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save({"state_dict": tensors, **extra}, path)
        return path

    return write


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_features_and_logits_equal_timms(name, state_dict, timm):
    network = peer("timm", name)
    path = state_dict(network)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    backbone = create_backbone(f"timm/{name}", path, out_features=list(STAGES)).eval()
    features_only = timm.create_model(
        name,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": network.state_dict()},
    )
    strides = features_only.feature_info.reduction()
    with torch.no_grad():
        expected = dict(zip(strides, features_only.eval()(images), strict=True))
        found = backbone(images)
        for stage, shape in backbone.output_shape().items():
            assert torch.equal(found[stage], expected[shape.stride])
            assert found[stage].shape[1] == shape.channels
        classifier = create_classifier(f"timm/{name}", weights=path).eval()
        assert torch.equal(classifier(images), network(images))
        ten = create_classifier(f"timm/{name}", num_classes=10)
    report = load_weights(ten, path)
    assert sorted(report.initialised) == ["linear.bias", "linear.weight"]
    assert not report.ignored


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_a_detector_trains_except_in_frozen_stages(name):
    options = {**SMALL, "MODEL.BACKBONE.ARCH": f"timm/{name}", "MODEL.SE.ENABLED": "None"}
    options |= {"MODEL.BACKBONE.FREEZE_AT": "2", "MODEL.RESNETS.NORM": "FrozenBN"}
    cfg = load_config("faster_rcnn_se_r50", [word for item in options.items() for word in item])
    model = build_model(cfg)
    objects = Instances((64, 64), gt_classes=torch.tensor([1]))
    objects.gt_boxes = Boxes(torch.tensor([[8.0, 8, 56, 56]]))
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with EventStorage():
        losses = model([{"image": image, "instances": objects}])
    sum(losses.values()).backward()
    backbone = model.backbone.bottom_up
    for key, parameter in backbone.net.named_parameters():
        is_frozen = backbone.stages[key.rpartition(".")[0]] <= 2
        assert (parameter.grad is None) == is_frozen
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    with torch.no_grad():
        assert len(model.eval()([{"image": image}])) == 1


@pytest.mark.long
def test_stages_are_frozen_up_to_the_feature_map_of_their_name():
    backbone = create_backbone("timm/regnety_002", freeze_at=2)
    frozen = {key for key, p in backbone.named_parameters() if not p.requires_grad}
    assert {key.split(".")[1] for key in frozen} == {"stem", "s1"}
    kinds = {type(m).__name__ for m in backbone.net.s1.modules()}
    assert "FrozenBatchNormAct2d" in kinds
    assert "BatchNormAct2d" not in kinds


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_SE)
def test_the_captured_gates_multiply_the_input_of_the_se_layer(name):
    classifier = create_classifier(f"timm/{name}")
    randomise(classifier)
    gates, seen = gates_of(classifier.backbone), {}
    for key, layer in gates.items():
        layer.register_forward_hook(
            lambda _, given, result, key=key: seen.update({key: (given[0], result.clone())})
        )
    with torch.no_grad(), capture_gates(gates) as values:
        classifier(torch.randn(2, 3, 64, 64))
    assert len(gates) == sum(
        key.endswith(("fc1.weight", "conv_reduce.weight"))
        for key, _ in classifier.named_parameters()
    )
    for key, (given, result) in seen.items():
        assert torch.equal(given * values[key][:, :, None, None], result)
    assert {key.split("_")[1] for key in gates} <= set("12345")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    # Radosavovic et al. 2020 (Table 4) and Tan and Le 2019 (Table 2).
    [("regnety_002", 3.2, 0.2), ("efficientnet_b0", 5.3, 0.39)],
)
def test_complexity_equals_the_published_one_and_includes_the_se_layers(name, millions, giga):
    classifier = create_classifier(f"timm/{name}")
    cost = measure(classifier, torch.zeros(1, 3, 224, 224)).total
    assert round(cost.parameters / 1e6, 1) == millions
    assert round(cost.macs / 1e9, 2) == giga
    se = [p.numel() for key, p in classifier.named_parameters() if ".se." in key]
    assert cost.se_parameters == sum(se)


def test_preprocessing_equals_that_of_the_pretrained_weights():
    found = create_backbone("timm/test_resnet.r160_in1k").preprocessing
    assert (found.format, found.mean, found.std) == ("RGB", (127.5,) * 3, (127.5,) * 3)
    # timm's crop_pct of 0.95 gives 160 / 0.95 = 168.4
    assert (found.resize, found.crop, found.interpolation) == (168, 160, "bilinear")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/test_vit", {}, "have the strides 16; expected 4, 8, 16 and 32"),
        ("timm/test_coatnet", {}, "only accepts images of"),
        ("timm/regnety_02", {}, "Did you mean .*timm/regnety_002"),
        ("timm/resnet18.xyz", {}, "Invalid pretrained tag .* Available: .*resnet18.a1_in1k"),
        ("timm/test_resnet", {"norm": "GN"}, "The norm is GN"),
        ("timm/test_resnet", {"freeze_at": 6}, "freeze_at is 6"),
        ("timm/test_resnet", {"out_features": ["stem"]}, "expected a list of names from: res2"),
        ("timm/test_resnet", {"se_ratio": 8}, "timm builds this network's SE layers"),
    ],
)
def test_an_incompatible_network_or_option_is_an_error(name, options, message):
    with pytest.raises(UserError, match=message):
        create_backbone(name, **options)


def test_the_evaluation_mode_equals_timms(monkeypatch, timm):
    def mode(name: str) -> str:
        return model_config(f"timm/{name}").INPUT.CLASSIFICATION.TEST_MODE

    assert timm.get_pretrained_cfg("tf_efficientnetv2_b3").crop_mode == "squash"
    assert mode("tf_efficientnetv2_b3") == "squash"
    assert mode("resnet18") == "short_side"
    bordered = replace(timm.get_pretrained_cfg("resnet18"), crop_mode="border")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: bordered)
    with pytest.raises(
        UserError, match="timm/resnet18 uses the evaluation mode border; expected one"
    ):
        mode("resnet18")


@pytest.mark.long
def test_a_network_without_padding_is_an_error():
    with pytest.raises(
        UserError, match=r"res2 .* shape \(160, 62, 62\) .* expected \(160, 64, 64\)"
    ):
        create_backbone("timm/inception_v4", out_features=["res2", "res5"])


def test_the_error_without_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'senet_transfer\[timm\]'"):
        create_backbone("timm/resnet18")


def test_an_older_file_without_the_mode_is_read_without_timm(tmp_path, monkeypatch):
    save_weights(create_classifier("timm/test_resnet"), path := tmp_path / "a.pth")
    checkpoint = torch.load(path)
    preprocessing = checkpoint["senet_transfer"]["preprocessing"]
    preprocessing["mode"] = "squash"
    torch.save(checkpoint, path)
    assert examine(path).preprocessing.mode == "squash"
    del preprocessing["mode"]
    torch.save(checkpoint, path := tmp_path / "older.pth")
    monkeypatch.setitem(sys.modules, "timm", None)
    found = examine(path).preprocessing
    assert found.mean == tuple(preprocessing["mean"])
    assert found.mode == "short_side"


def test_timms_names_are_listed_on_request_only():
    assert "timm/regnety_002" in list_models("timm/regnety_*")
    assert not [name for name in list_models() if "/" in name]


_PREFIXES = ("model.", "net.backbone.", "backbone.", "timm_model.", "module.encoder_q.")


@pytest.mark.long
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_a_state_dict_behind_a_prefix_loads(name, tmp_path):
    network, images = peer("timm", name), torch.randn(1, 3, 64, 64)
    path, state = tmp_path / "a.pth", network.state_dict()

    def logits(**choice):
        return create_classifier(f"timm/{name}", weights=path, **choice).eval()(images)

    for prefix in _PREFIXES:
        torch.save({"state_dict": prefixed(prefix, state)}, path)
        assert torch.equal(logits(), network(images))
    torch.save(prefixed("model.", state) | {"criterion.weight": torch.ones(5)}, path)
    with pytest.raises(UserError, match=r"classifier, set prefix='model\.'"):
        logits()
    assert torch.equal(logits(prefix="model."), network(images))
    other = peer("timm", name, seed=1)
    torch.save(prefixed("encoder_q.", state) | prefixed("encoder_k.", other.state_dict()), path)
    with pytest.raises(UserError, match=r"2 networks.* encoder_q\., encoder_k\."):
        logits()
    assert torch.equal(logits(prefix="encoder_k."), other(images))
    state = {re.sub(r"^(\w+\.)(?=\d+\.)", r"\1module.", key): t for key, t in state.items()}
    assert any(".module." in key for key in state)  # DataParallel around a part of the network
    torch.save(prefixed("model.", state), path)
    assert torch.equal(logits(), network(images))


@pytest.mark.long
def test_another_head_of_a_timm_network_can_be_ignored(tmp_path):
    network = peer("timm", "test_resnet")
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}
    head = {"fc.0.weight": torch.ones(4, 4), "fc.2.bias": torch.ones(4)}
    torch.save(prefixed("encoder_q.", state | head), path := tmp_path / "a.pth")
    with pytest.raises(UserError, match="head='ignore'"):
        create_backbone("timm/test_resnet", path)
    backbone = create_backbone("timm/test_resnet", path, head="ignore").eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone(images)["res5"], network.forward_features(images))


@pytest.mark.long
def test_a_file_of_another_network_is_an_error_that_lists_the_tensors(state_dict, timm):
    other = timm.create_model("test_efficientnet")
    with pytest.raises(UserError, match=r"missing from the file: net.conv1.0.weight"):
        create_backbone("timm/test_resnet", state_dict(other))
    stated = state_dict(timm.create_model("test_resnet"), ".pth", arch="test_efficientnet")
    with pytest.raises(UserError, match="contains the network test_efficientnet"):
        create_backbone("timm/test_resnet", stated)
    for options in ({"model": "test_efficientnet"}, Namespace(model="timm/test_efficientnet")):
        stated = state_dict(timm.create_model("test_resnet"), ".pth", args=options)
        with pytest.raises(UserError, match="contains the network test_efficientnet"):
            create_backbone("timm/test_resnet", stated)
    with pytest.raises(UserError, match="weight family is 'torchvision_v1'"):
        create_backbone("timm/test_resnet", stated, family="torchvision_v1")


@pytest.mark.long
def test_a_name_outside_the_catalogue_is_downloaded_by_timm_once(tmp_path, monkeypatch, timm):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published, calls = peer("timm", "test_resnet"), []
    create = timm.create_model

    def download(name, pretrained=False, **options):
        calls.append((name, pretrained))
        return published if pretrained else create(name, **options)

    monkeypatch.setattr(timm, "create_model", download)
    images = torch.randn(1, 3, 64, 64)
    for _ in range(2):
        loaded = find_model(weights="timm/test_resnet.r160_in1k").build("cpu")
        assert torch.equal(loaded.model(images), published(images))
        assert loaded.cfg.INPUT.CLASSIFICATION.TEST_CROP == 160
        assert loaded.classes[:2] == ["tench", "goldfish"]
    assert [call for call in calls if call[1]] == [("test_resnet.r160_in1k", True)]
    with pytest.raises(UserError, match="contains the network test_resnet.r160_in1k"):
        create_backbone("timm/resnet10t", "timm/test_resnet.r160_in1k")


def test_a_failed_download_reports_where_to_put_the_file(tmp_path, monkeypatch, timm):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail(*words, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"no route to host.*timm/test_resnet.r160_in1k.safetensors"
    ):
        timm_networks.fetch_timm("timm/test_resnet")
