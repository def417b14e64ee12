"""Tests that loaded VGG and Inception weights give the same outputs as the original networks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from senet_transfer import UserError, create_backbone, create_classifier, load_weights, save_weights
from senet_transfer.export.conversion import convert_file
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights.mapping.source import examine
from tests.weights.caffe_networks import se_bn_inception
from tests.weights.peers import (
    images,
    load_and_expect_no_change,
    outputs_of_ours,
    peer,
    randomise,
    save,
    worst,
)

slow = pytest.mark.slow

GOOGLE = Preprocessing(mean=(127.5,) * 3, std=(127.5,) * 3, crop=299, resize=341)


def inception(package: str) -> tuple[nn.Module, list[nn.Module]]:
    """Return an Inception-ResNet-v2 and the modules that correspond to res2 to res5."""
    name = {"timm": "inception_resnet_v2"}.get(package, "inceptionresnetv2")
    model = peer(package, name)
    if package != "timm":
        # The original pool supports only images of 299 pixels.
        model.avgpool_1a = nn.AdaptiveAvgPool2d(1)
    return model, [model.conv2d_4a, model.repeat, model.repeat_1, model.conv2d_7b]


@torch.no_grad()
def outputs(model: nn.Module, stages: list[nn.Module], x: torch.Tensor) -> dict:
    found: dict[str, torch.Tensor] = {}
    for number, module in enumerate(stages, 2):
        module.register_forward_hook(
            lambda m, a, out, key=f"res{number}": found.update({key: +out})
        )
    found["logits"] = model(x)
    return found


@pytest.mark.parametrize("package", ["timm", pytest.param("pretrainedmodels", marks=slow)])
@pytest.mark.long
def test_inception_resnet(package, tmp_path):
    model, stages = inception(package)
    path = save(model, tmp_path / "peer.pth")
    x = images(size=(107, 139))
    expected = outputs(model, stages, x)
    created = create_classifier("inception_resnet_v2", weights=path).eval()
    assert worst(expected, outputs_of_ours(created, x)) < 1e-5
    family = "timm" if package == "timm" else "cadene"
    assert examine(path).family.name == family
    timms = replace(GOOGLE, resize=333, interpolation="bicubic")
    assert created.preprocessing == (timms if package == "timm" else GOOGLE)


@pytest.mark.long
def test_bn_inception_with_biases_of_convolutions(tmp_path):
    model = peer("pretrainedmodels", "bninception")
    model.global_pool = nn.AdaptiveAvgPool2d(1)
    path = save(model, tmp_path / "peer.pth")
    created = create_classifier("bn_inception", weights=path).eval()
    with torch.no_grad():
        expected = {"logits": model(images()), "res5": model.features(images())}
    found = outputs_of_ours(created, images())
    assert worst(expected, {key: found[key] for key in expected}) < 1e-5
    assert examine(path).family.name == "cadene"
    pixels = created.preprocessing
    assert (pixels.format, pixels.mean, pixels.std) == ("BGR", (104.0, 117.0, 128.0), (1.0,) * 3)
    assert (pixels.resize, pixels.crop) == (256, 224)

    with pytest.raises(UserError, match="contains bn_inception, but the model is resnet18"):
        load_and_expect_no_change(create_backbone("resnet18"), path)


@slow
def test_vgg_with_its_hidden_layers(tmp_path):
    model = peer("torchvision", "vgg16_bn")
    path = save(model, tmp_path / "peer.pth")
    expected = outputs(model, [model.features[i] for i in (22, 32, 42, 43)], images())
    created = create_classifier("vgg16_bn", weights=path).eval()
    assert worst(expected, outputs_of_ours(created, images())) < 1e-5
    assert examine(path).family.name == "torchvision_v1"
    assert created.preprocessing == Preprocessing()

    report = load_weights(create_backbone("vgg16_bn"), path)
    assert set(report.ignored.values()) == {"classifier: the model has none"}
    assert len(report.ignored) == 6


@pytest.mark.parametrize(
    "name",
    ["se_bn_inception", "mobilenet", "se_mobilenet", "se_shufflenet_g3", "se_vgg16_bn"]
    + [pytest.param("se_inception_resnet_v2", marks=slow)],
)
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "saved"])
@pytest.mark.long
def test_this_projects_own_files_are_restored(name, bare, tmp_path):
    backbone = randomise(create_backbone(name, out_features=["res4"]))
    path = tmp_path / "own.pth"
    save(backbone, path) if bare else save_weights(backbone, path)
    source = examine(path)
    assert (source.family.name, source.architecture.name) == ("senet_transfer", name)
    loaded = create_backbone(name, weights=path, out_features=["res4"])
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key

    other = "se_resnet18" if name.startswith("se_") else "resnet18"
    with pytest.raises(UserError, match=rf"The file contains {name}, but the model is {other}"):
        load_and_expect_no_change(create_backbone(other), path)


@pytest.mark.long
def test_the_authors_bn_inception_is_converted_with_a_check(tmp_path):
    net = se_bn_inception(classes=10)
    net.write(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")
    out = tmp_path / "own.safetensors"
    convert_file(tmp_path / "net.caffemodel", out, check=True)
    loaded = create_classifier("se_bn_inception", 10, weights=out)
    assert loaded.preprocessing.format == "BGR"
    with pytest.raises(UserError, match="The file's network is se_bn_inception"):
        convert_file(tmp_path / "net.caffemodel", tmp_path / "timm.pth", to="timm")


def background_file(tmp_path, classes: int):
    """Build and save an Inception-ResNet-v2 with the given number of classes."""
    model, _ = inception("pretrainedmodels")
    model.last_linear = nn.Linear(1536, classes)
    return model, save(model, tmp_path / f"{classes}.pth")


@slow
def test_the_published_class_of_the_background_is_left_out(tmp_path):
    model, path = background_file(tmp_path, 1001)
    created = create_classifier("inception_resnet_v2", weights=path).eval()
    assert torch.equal(created.linear.weight, model.last_linear.weight[1:])
    assert torch.equal(created.linear.bias, model.last_linear.bias[1:])
    assert "background" in str(examine(path).notes)

    model, path = background_file(tmp_path, 7)
    created = create_classifier("inception_resnet_v2", 7, weights=path)
    assert torch.equal(created.linear.weight, model.last_linear.weight)


@pytest.mark.parametrize("other", ["vgg13_bn", "vgg16"])
@pytest.mark.long
def test_other_networks_with_the_same_names_are_rejected(other, tmp_path):
    model = getattr(pytest.importorskip("torchvision").models, other)(init_weights=False)
    file = {f"features.{key}": value for key, value in model.features.state_dict().items()}
    torch.save(file, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="does not fit the model|match no known weight family"):
        load_and_expect_no_change(create_backbone("vgg16_bn"), tmp_path / "vgg.pth")
