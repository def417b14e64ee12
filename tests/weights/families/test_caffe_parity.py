"""Tests that loaded Caffe networks give the same outputs as OpenCV with the same files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from senet_transfer import UserError, create_classifier
from senet_transfer.weights.families.caffe_geometry import stated_geometry
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.formats.caffe.layers import CaffeLayer
from senet_transfer.weights.mapping.source import examine
from tests.weights import caffe_networks
from tests.weights.caffe_networks import DESIGNS, places_resnet, se_bn_inception, senet
from tests.weights.caffe_writer import CaffeNet
from tests.weights.opencv import opencv_network
from tests.weights.peers import check_wrong_options, images, outputs_of_ours, worst

slow = pytest.mark.slow


def _opencv(net: CaffeNet, folder) -> dict[str, torch.Tensor]:
    """Run a network in OpenCV, image by image; return logits and the outputs of res2 to res5."""
    net.write(folder / "net.prototxt", folder / "net.caffemodel", for_opencv=True)
    runner = opencv_network(folder / "net.prototxt", folder / "net.caffemodel")
    # Fusion would remove the intermediate feature maps.
    runner.enableFusion(False)
    names = [layer["name"] for layer in net.layers]
    joins = [layer["name"] for layer in net.layers if layer["type"] in ("Axpy", "Eltwise")]
    last = {stage: [j for j in joins if f"{stage}" in j[:5]][-1] for stage in "2345"}
    relus = [
        f"{name}/relu" if f"{name}/relu" in names else f"{name}_relu" for name in last.values()
    ]
    found = []
    for image in images().numpy():
        runner.setInput(image[None])
        found.append(runner.forward([*relus, names[-1]]))
    keys = ["res2", "res3", "res4", "res5", "logits"]
    stacked = [np.concatenate(outputs) for outputs in zip(*found, strict=True)]
    outputs = {key: torch.from_numpy(value) for key, value in zip(keys, stacked, strict=True)}
    outputs["logits"] = outputs["logits"].flatten(1)
    return outputs


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("SE-ResNet-50", "se_resnet50"),
        ("SE-ResNeXt-50", "se_resnext50_32x4d"),
        pytest.param("SE-ResNet-101", "se_resnet101", marks=slow),
        pytest.param("SE-ResNet-152", "se_resnet152", marks=slow),
        pytest.param("SE-ResNeXt-101", "se_resnext101_32x4d", marks=slow),
        pytest.param("SENet-154", "senet154", marks=slow),
    ],
)
@pytest.mark.long
def test_the_authors_networks_give_opencvs_logits(name, ours, tmp_path):
    expected = _opencv(senet(name), tmp_path)
    path = tmp_path / "net.caffemodel"
    model = create_classifier(ours, weights=path).eval()
    assert worst(expected, outputs_of_ours(model, images())) < 1e-4
    assert examine(path).family.name == "caffe"
    assert model.preprocessing.format == "BGR"
    assert model.preprocessing.mean == (104.0, 117.0, 123.0)
    assert model.preprocessing.std == (1.0, 1.0, 1.0)
    check_wrong_options(ours, model, expected, path)


@pytest.mark.long
def test_the_authors_bn_inception_gives_opencvs_logits(tmp_path):
    net = se_bn_inception()
    net.write(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", for_opencv=True)
    runner = opencv_network(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")
    runner.enableFusion(False)
    ends = {"res2": "conv2/relu_3x3", "logits": "classifier"}
    ends |= {f"res{m[0]}": f"inception_{m}_scale" for m in ("3b", "4d", "5b")}
    found = []
    for image in images().numpy():
        runner.setInput(image[None])
        found.append(runner.forward(list(ends.values())))
    stacked = [torch.from_numpy(np.concatenate(out)) for out in zip(*found, strict=True)]
    expected = dict(zip(ends, stacked, strict=True))
    expected["logits"] = expected["logits"].flatten(1)

    model = create_classifier("se_bn_inception", weights=tmp_path / "net.caffemodel").eval()
    assert worst(expected, outputs_of_ours(model, images())) < 1e-4
    source = examine(tmp_path / "net.caffemodel")
    assert source.family.name == "caffe"
    assert source.architecture.name == "se_bn_inception"
    assert not source.unknown
    assert (model.preprocessing.format, model.preprocessing.mean) == ("BGR", (104.0, 117.0, 123.0))


@pytest.mark.parametrize(
    ("blocks", "ours"),
    [((3, 4, 6, 3), "resnet50"), pytest.param((3, 8, 36, 3), "resnet152", marks=slow)],
)
@pytest.mark.long
def test_places365_in_caffe(blocks, ours, tmp_path):
    expected = _opencv(places_resnet(blocks), tmp_path)
    path = tmp_path / "net.caffemodel"
    model = create_classifier(ours, 365, weights=path).eval()
    assert worst(expected, outputs_of_ours(model, images())) < 1e-4
    assert examine(path).family.name == "places365_caffe"
    assert model.preprocessing.format == "BGR"
    check_wrong_options(ours, model, expected, path)


@pytest.mark.long
def test_a_files_definition_takes_precedence_over_the_familys(tmp_path, monkeypatch):
    # The stride in a file takes precedence over the one in the authors' definition.
    changed = replace(DESIGNS["SE-ResNet-50"], stride_in_1x1=False)
    monkeypatch.setitem(caffe_networks.DESIGNS, "SE-ResNet-50", changed)
    expected = _opencv(senet("SE-ResNet-50", classes=10), tmp_path)
    model = create_classifier("se_resnet50", 10, weights=tmp_path / "net.caffemodel").eval()
    assert not examine(tmp_path / "net.caffemodel").geometry.stride_in_1x1
    assert worst(expected, outputs_of_ours(model, images())) < 1e-4


@pytest.mark.long
def test_a_different_eps_is_folded_into_the_variances(tmp_path):
    net = senet("SE-ResNet-50", classes=10)
    for layer in net.layers:
        if layer["type"] == "BatchNorm":
            layer["params"]["batch_norm_param"]["eps"] = 0.1
    expected = _opencv(net, tmp_path)
    model = create_classifier("se_resnet50", 10, weights=tmp_path / "net.caffemodel").eval()
    assert worst(expected, outputs_of_ours(model, images())) < 1e-4


@pytest.mark.long
def test_a_bias_of_a_convolution_is_folded_into_the_mean(tmp_path):
    # In He et al.'s ResNet-50, the first convolution has a bias.
    net = senet("SE-ResNet-50", classes=10)
    first = net.layers[0]
    first["blobs"].append(np.random.default_rng(2).normal(0, 1, 64).astype(np.float32))
    first["params"]["convolution_param"].pop("bias_term")
    expected = _opencv(net, tmp_path)
    model = create_classifier("se_resnet50", 10, weights=tmp_path / "net.caffemodel").eval()
    assert worst(expected, outputs_of_ours(model, images())) < 1e-4


@pytest.mark.long
def test_a_stem_pool_that_no_backbone_has_is_rejected(tmp_path):
    net = senet("SE-ResNet-50", classes=10)
    pool = next(layer for layer in net.layers if layer["name"].startswith("pool1"))
    pool["params"]["pooling_param"]["pad"] = 1
    net.write(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")
    with pytest.raises(UserError, match="The pooling layer of the stem"):
        create_classifier("se_resnet50", 10, weights=tmp_path / "net.caffemodel")


@pytest.mark.parametrize(
    ("first_1x1", "first_3x3", "in_1x1"),
    [
        ((2, 2, 2), (1, 1, 1), True),
        ((1, 1, 1), (2, 2, 2), False),
        ((2, 2, 2), (1, 1, 2), None),
        ((1, 1, 2), (2, 2, 1), None),
        ((1, 1, 1), (1, 1, 1), None),
        ((2, 2, [1, 2]), (1, 1, 1), None),
    ],
)
def test_stages_with_different_stride_placement_are_rejected(first_1x1, first_3x3, in_1x1):
    layers = [
        CaffeLayer(
            f"res{stage}a_branch2{branch}",
            "Convolution",
            params={"convolution_param": {"kernel_size": [kernel], "stride": np.ravel(s).tolist()}},
        )
        for branch, kernel, strides in (("a", 1, first_1x1), ("b", 3, first_3x3))
        for stage, s in zip((3, 4, 5), strides, strict=True)
    ]
    expected = Geometry(stride_in_1x1=False, stem_pool="ceil")
    if in_1x1 is None:
        with pytest.raises(
            UserError, match=r"net.caffemodel: .* have strides .*; expected stride 2"
        ):
            stated_geometry("net.caffemodel", layers, expected)
    else:
        assert stated_geometry("net.caffemodel", layers, expected).stride_in_1x1 == in_1x1
