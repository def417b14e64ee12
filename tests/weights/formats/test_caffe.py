"""Tests for Caffe files: outputs, layer parameters, old formats and damaged files."""

import os
import time

import cv2
import numpy as np
import pytest
import torch

from senet_transfer.errors import UserError
from senet_transfer.weights.formats.caffe.caffemodel import caffe_tensors, read_caffemodel
from senet_transfer.weights.formats.caffe.layers import CaffeLayer, window_of
from senet_transfer.weights.formats.reader import read_tensors
from tests.weights.caffe_runner import run_caffe
from tests.weights.caffe_writer import CaffeNet
from tests.weights.opencv import opencv_network


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _bn(rng: np.random.Generator, channels: int) -> dict[str, np.ndarray]:
    return {
        "weight": rng.uniform(0.5, 1.5, channels),
        "bias": rng.normal(0, 0.3, channels),
        "running_mean": rng.normal(0, 0.3, channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }


def _conv_weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)


def _se_net(size: int = 33, factor: float = 999.98) -> CaffeNet:
    """Build a stem and a grouped SE bottleneck with a projection, as in SENet's Caffe files."""
    rng = _rng()
    net = CaffeNet("tiny SE", (1, 3, size, size))
    x = net.conv_bn(
        "conv1/7x7_s2",
        "data",
        _conv_weight(rng, 8, 3, 7, 7),
        _bn(rng, 8),
        relu="conv1/relu_7x7_s2",
        factor=factor,
        stride=2,
        pad=3,
    )
    x = net.pool("pool1/3x3_s2", x, kernel=3, stride=2)
    y = net.conv_bn(
        "conv2_1_1x1_reduce",
        x,
        _conv_weight(rng, 8, 8, 1, 1),
        _bn(rng, 8),
        relu="conv2_1_1x1_reduce/relu",
        stride=2,
    )
    y = net.conv_bn(
        "conv2_1_3x3",
        y,
        _conv_weight(rng, 8, 2, 3, 3),
        _bn(rng, 8),
        relu="conv2_1_3x3/relu",
        pad=1,
        group=4,
    )
    y = net.conv_bn("conv2_1_1x1_increase", y, _conv_weight(rng, 16, 8, 1, 1), _bn(rng, 16))
    gate = net.global_pool("conv2_1_global_pool", y)
    gate = net.conv("conv2_1_1x1_down", gate, _conv_weight(rng, 4, 16, 1, 1), rng.normal(0, 1, 4))
    gate = net.relu("conv2_1_1x1_down/relu", gate)
    gate = net.conv("conv2_1_1x1_up", gate, _conv_weight(rng, 16, 4, 1, 1), rng.normal(0, 1, 16))
    gate = net.sigmoid("conv2_1_prob", gate)
    shortcut = net.conv_bn(
        "conv2_1_1x1_proj", x, _conv_weight(rng, 16, 8, 1, 1), _bn(rng, 16), stride=2
    )
    z = net.relu("conv2_1/relu", net.axpy("conv2_1", gate, y, shortcut))
    z = net.pool("pool5", z, kernel=2, stride=2, method="AVE")
    z = net.global_pool("pool5/global", z)
    net.fc("classifier", z, rng.normal(0, 0.3, (10, 16)), rng.normal(0, 1, 10))
    return net


def _inception_net() -> CaffeNet:
    """Build a network with a Concat layer, a gate as in SE-BN-Inception, and an average pool."""
    rng = _rng(1)
    net = CaffeNet("tiny inception", (2, 3, 17, 17))
    a = net.conv_bn("a", "data", _conv_weight(rng, 6, 3, 1, 1), _bn(rng, 6), relu="a/relu")
    pool = net.pool("pool", "data", kernel=3, stride=1, pad=1, method="AVE")
    b = net.conv_bn("b", pool, _conv_weight(rng, 4, 3, 3, 3), _bn(rng, 4), relu="b/relu", pad=1)
    both = net.concat("inception/concat", a, b)
    gate = net.global_pool("inception_global_pool", both)
    gate = net.conv("inception_1x1_up", gate, _conv_weight(rng, 10, 10, 1, 1), rng.normal(0, 1, 10))
    gate = net.sigmoid("inception_prob", gate)
    x = net.gate_channels("inception", both, gate)
    x = net.dropout("drop", net.global_pool("pool5", x), 0.2)
    net.softmax("prob", net.fc("classifier", x, rng.normal(0, 1, (7, 10))))
    return net


def _opencv(net: CaffeNet, image: np.ndarray, folder) -> np.ndarray:
    net.write(folder / "cv.prototxt", folder / "cv.caffemodel", for_opencv=True)
    oracle = opencv_network(folder / "cv.prototxt", folder / "cv.caffemodel")
    oracle.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    oracle.setInput(image)
    return oracle.forward()


@pytest.mark.parametrize("net", [_se_net(), _inception_net()], ids=lambda net: net.name)
def test_a_loaded_network_computes_the_same_as_opencv(net, tmp_path):
    image = _rng(2).normal(0, 1, net.shape).astype(np.float32)
    expected = torch.from_numpy(_opencv(net, image, tmp_path))
    net.write(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")
    file = read_tensors(tmp_path / "net.caffemodel")
    blobs = run_caffe(file.layers, file.tensors, torch.from_numpy(image))
    last = blobs[file.layers[-1].tops[0]]
    torch.testing.assert_close(last.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_layers_are_read_as_written(tmp_path):
    net = _se_net()
    net.layers[0]["params"]["convolution_param"]["dilation"] = [1, 1]
    (tmp_path / "net.caffemodel").write_bytes(net.caffemodel())
    name, layers = read_caffemodel(tmp_path / "net.caffemodel")
    assert name == "tiny SE"
    for read, written in zip(layers, net.layers, strict=True):
        assert (read.name, read.type) == (written["name"], written["type"])
        assert (read.bottoms, read.tops) == (tuple(written["bottoms"]), (written["top"],))
        for blob, expected in zip(read.blobs, written["blobs"], strict=True):
            np.testing.assert_array_equal(blob, expected)
    params = layers[0].params["convolution_param"]
    assert params == {
        "num_output": 8,
        "kernel_size": [7],
        "stride": [2],
        "pad": [3],
        "dilation": [1, 1],
    }


def test_geometry_is_read_from_the_definition(tmp_path):
    net = _se_net()
    net.write(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")
    layers = {layer.name: layer for layer in read_caffemodel(tmp_path / "net.caffemodel")[1]}
    stem = window_of(layers["conv1/7x7_s2"])
    assert (stem.kernel, stem.stride, stem.pad, stem.group) == ((7, 7), (2, 2), (3, 3), 1)
    assert window_of(layers["conv2_1_3x3"]).group == 4
    pool = window_of(layers["pool1/3x3_s2"])
    assert (pool.kernel, pool.pad, pool.ceil, pool.method) == ((3, 3), (0, 0), True, "MAX")
    assert window_of(layers["conv2_1_global_pool"]).is_global
    assert layers["conv1/7x7_s2/bn"].eps == 1e-5
    norm = CaffeNet("eps")
    norm.batch_norm("bn", "data", np.ones(2), np.ones(2), eps=2e-5)
    assert _layers_of(tmp_path, norm.caffemodel())[0].eps == 2e-5
    with pytest.raises(UserError, match=r"prototxt"):
        window_of(CaffeLayer("conv", "Convolution"))


def test_geometry_by_height_and_width():
    params = {"num_output": 4, "kernel_h": 1, "kernel_w": 7, "pad_w": 3, "pad_h": 0, "stride": [2]}
    window = window_of(CaffeLayer("c", "Convolution", params={"convolution_param": params}))
    assert (window.kernel, window.pad, window.stride) == ((1, 7), (0, 3), (2, 2))


@pytest.mark.parametrize(
    "options", [{}, {"legacy_shapes": True}, {"doubles": True}, {"packed": False}], ids=str
)
def test_every_encoding_of_blobs_gives_the_same_tensors(options, tmp_path):
    net = _se_net()
    (tmp_path / "net.caffemodel").write_bytes(net.caffemodel(**options))
    tensors = read_tensors(tmp_path / "net.caffemodel").tensors
    blobs = {layer["name"]: layer["blobs"] for layer in net.layers}
    torch.testing.assert_close(
        tensors["conv2_1_3x3/weight"], torch.from_numpy(blobs["conv2_1_3x3"][0]), rtol=0, atol=0
    )
    assert tensors["classifier/weight"].shape == (10, 16)
    assert tensors["classifier/bias"].shape == (10,)
    assert tensors["conv1/7x7_s2/bn/running_var"].shape == (8,)


def test_files_of_2014_are_read(tmp_path):
    rng = _rng(3)
    net = CaffeNet("old", (1, 3, 9, 9))
    x = net.conv("conv", "data", _conv_weight(rng, 4, 3, 3, 3), rng.normal(0, 1, 4), stride=2)
    x = net.pool("pool", net.relu("relu", x), kernel=2, stride=2)
    net.softmax("prob", net.fc("fc", x, rng.normal(0, 1, (5, 16)), rng.normal(0, 1, 5)))
    (tmp_path / "old.caffemodel").write_bytes(net.v1_caffemodel())
    (tmp_path / "cv.prototxt").write_text(net.prototxt())
    file = read_tensors(tmp_path / "old.caffemodel")
    assert [layer.type for layer in file.layers] == [layer["type"] for layer in net.layers]
    assert window_of(file.layers[0]).stride == (2, 2)
    image = rng.normal(0, 1, net.shape).astype(np.float32)
    oracle = opencv_network(tmp_path / "cv.prototxt", tmp_path / "old.caffemodel")
    oracle.setInput(image)
    ours = run_caffe(file.layers, file.tensors, torch.from_numpy(image))["prob"]
    torch.testing.assert_close(ours, torch.from_numpy(oracle.forward()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 999.98, 1e-3])
def test_statistics_are_divided_by_their_factor(factor, tmp_path):
    (tmp_path / "net.caffemodel").write_bytes(_se_net(factor=factor).caffemodel())
    tensors = read_tensors(tmp_path / "net.caffemodel").tensors
    (tmp_path / "one.caffemodel").write_bytes(_se_net(factor=1).caffemodel())
    expected = read_tensors(tmp_path / "one.caffemodel").tensors
    torch.testing.assert_close(tensors, expected, rtol=1e-6, atol=1e-7)


def test_a_factor_of_zero_means_statistics_of_zero():
    blobs = tuple(np.array(values, np.float32) for values in ([1, 2], [3, 4], [0]))
    tensors = caffe_tensors([CaffeLayer("bn", "BatchNorm", blobs=blobs)])
    assert tensors["bn/running_mean"].tolist() == [0, 0]
    assert tensors["bn/running_var"].tolist() == [0, 0]


def test_blobs_of_unknown_layers_are_kept():
    layer = CaffeLayer("slope", "PReLU", blobs=(np.ones(3, np.float32),))
    assert list(caffe_tensors([layer])) == ["slope/blob0"]


def test_tensors_own_aligned_writable_memory(tmp_path):
    (tmp_path / "net.caffemodel").write_bytes(_se_net().caffemodel())
    for tensor in read_tensors(tmp_path / "net.caffemodel").tensors.values():
        assert tensor.data_ptr() % 4 == 0
        assert tensor.is_contiguous()
        tensor.add_(1)  # would crash if the memory were mapped from the file


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (CaffeLayer("bn", "BatchNorm", blobs=(np.ones(2),) * 2), "factor"),
        (CaffeLayer("bn", "BatchNorm", blobs=(np.ones(2), np.ones(3), np.ones(1))), "same length"),
        (CaffeLayer("c", "Convolution", blobs=(np.ones((2, 2)),)), "four-dimensional"),
        (CaffeLayer("c", "Convolution", blobs=(np.ones((2, 1, 3, 3)), np.ones(3))), "2 values"),
        (
            CaffeLayer(
                "c",
                "Convolution",
                blobs=(np.ones((2, 1, 3, 3)),),
                params={"convolution_param": {"num_output": 4, "kernel_size": [3]}},
            ),
            "4 outputs",
        ),
        (
            CaffeLayer(
                "c",
                "Convolution",
                blobs=(np.ones((4, 1, 3, 3)),),
                params={"convolution_param": {"num_output": 4, "kernel_size": [5]}},
            ),
            "kernel of",
        ),
    ],
)
def test_blobs_that_contradict_their_layer_are_rejected(layer, expected):
    with pytest.raises(UserError, match=expected):
        caffe_tensors([layer])


def test_a_duplicate_layer_is_rejected():
    layer = CaffeLayer("s", "Scale", blobs=(np.ones(2), np.ones(2)))
    with pytest.raises(UserError, match="two layers named 's'"):
        caffe_tensors([layer, layer])


def _layers_of(folder, data: bytes) -> list[CaffeLayer]:
    (folder / "whole.caffemodel").write_bytes(data)
    return read_caffemodel(folder / "whole.caffemodel")[1]


@pytest.mark.long
def test_truncation_inside_a_layer_is_rejected_but_not_between_layers(tmp_path):
    data = _se_net().caffemodel()
    whole = len(_layers_of(tmp_path, data))
    between = 0
    for end in range(0, len(data), 97):
        path = tmp_path / "cut.caffemodel"
        path.write_bytes(data[:end])
        try:
            layers = read_tensors(path).layers
        except UserError:
            continue
        # The format has no end marker, so a file that is truncated between two layers is valid.
        between += 1
        assert len(layers) < whole
    assert between <= 2


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (b"\x2a\x06" + bytes(6), "a known format"),  # one and a half floats, packed
        (
            b"\x2a\x08" + bytes(8) + b"\x3a\x03\x0a\x01\x03",
            r"2 values, which do not match its shape \(3,\)",
        ),
        (b"\x2a\x08" + bytes(8) + b"\x3a\x0c\x0a\x0a" + b"\xff" * 9 + b"\x01", r"shape \(-1,\)"),
        (
            b"\x2a\x04" + bytes(4) + b"\x3a\x23\x0a\x21" + b"\x01" * 33,
            "the invalid shape",
        ),
    ],
)
def test_a_blob_that_contradicts_itself_is_rejected(blob, expected, tmp_path):
    layer = b"\x0a\x01c" + b"\x12\x0bConvolution" + bytes([0x3A, len(blob)]) + blob
    path = tmp_path / "blob.caffemodel"
    path.write_bytes(b"\xa2\x06" + bytes([len(layer)]) + layer)
    with pytest.raises(UserError, match=expected):
        read_tensors(path)


def test_fields_unknown_in_a_layer_are_skipped_and_at_the_top_rejected(tmp_path):
    data, path = _se_net().caffemodel(), tmp_path / "net.caffemodel"
    path.write_bytes(data + b"\xa2\x06\x05\xfa\x3f\x02ab")  # a layer with field 1023
    assert read_tensors(path).layers[-1] == CaffeLayer("", "")
    path.write_bytes(data + b"\xfa\x3f\x02ab")
    with pytest.raises(UserError, match="fields that are not part of a Caffe network"):
        read_tensors(path)


def test_a_name_that_is_not_utf8_is_rejected(tmp_path):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(_se_net().caffemodel().replace(b"conv2_1_3x3/bn", b"conv2_1_3x3/\xff\xfe"))
    with pytest.raises(UserError, match="a known format"):
        read_tensors(path)


def test_a_file_over_the_limit_of_protobuf_is_not_read(tmp_path):
    path = tmp_path / "huge.caffemodel"
    path.write_bytes(_se_net().caffemodel())
    os.truncate(path, 2**31)  # creates a sparse file
    with pytest.raises(UserError, match="2 GiB"):
        read_tensors(path)


def test_an_unknown_pooling_method_is_rejected():
    layer = CaffeLayer("pool", "Pooling", params={"pooling_param": {"pool": 7}})
    with pytest.raises(UserError, match="pooling method 7"):
        window_of(layer)


def test_a_file_of_2013_is_an_error_with_a_remedy(tmp_path):
    path = tmp_path / "v0.caffemodel"
    path.write_bytes(b"\x0a\x03old" + b"\x12\x07\x0a\x05\x0a\x03abc")
    with pytest.raises(UserError, match="upgrade_net_proto_binary"):
        read_tensors(path)


def test_a_definition_given_as_weights_is_reported(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(_se_net().prototxt())
    with pytest.raises(UserError, match="Use the .caffemodel"):
        read_tensors(path)


@pytest.mark.slow
def test_reading_is_fast(tmp_path):
    net = CaffeNet("wide")
    weight = np.zeros((2048, 2048, 3, 3), np.float32)
    for index in range(2):
        net.conv(f"conv{index}", "data", weight, pad=1)
    (tmp_path / "wide.caffemodel").write_bytes(net.caffemodel())
    start = time.perf_counter()
    _, layers = read_caffemodel(tmp_path / "wide.caffemodel")
    assert time.perf_counter() - start < 3  # for 300 MB
    assert layers[1].blobs[0].shape == weight.shape
