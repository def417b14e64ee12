"""Tests for converting ONNX files to float16 and int8."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from senet_transfer import UserError, create_classifier
from senet_transfer.config.load import load_config
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.export import export_network, write
from senet_transfer.export.precision import CalibrationImages, convert_precision
from senet_transfer.export.write import export_model
from senet_transfer.preprocessing import CIFAR10, normalise
from tests.export.test_export import randomised, with_statistics

onnxruntime = pytest.importorskip("onnxruntime")
COLOURS = {"blue": (40, 60, 190), "green": (50, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> CalibrationImages:
    """Write four noisy images in each of three colours; each colour is a class."""
    folder, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for index in range(4):
            pixels = np.clip(draw.normal(colour, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return CalibrationImages(str(folder), EvalTransform(resize=32, crop=32), list(COLOURS))


@pytest.fixture(scope="module")
def exported(images, tmp_path_factory) -> Path:
    """Export a classifier whose linear layer is fitted to the classes of ``images``."""
    model = randomised(create_classifier("se_cifar_resnet8", num_classes=3))
    with_statistics(model, 32)
    batch = torch.from_numpy(np.concatenate(list(images.batches(images.paths()))))
    mean, std = CIFAR10.channel_values()
    kept = []
    hook = model.linear.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(normalise(batch, mean, std))
        hook.remove()
        target = torch.eye(3)[torch.from_numpy(images.labels())] - 1 / 3
        model.linear.weight.copy_(torch.linalg.lstsq(kept[0], target).solution.T)
        model.linear.bias.zero_()
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    options = {"form": "onnx", "preprocessing": CIFAR10, "size": (32, 32)}
    export_network(model, path, classes=list(COLOURS), **options)
    return path


@pytest.mark.parametrize(
    ("precision", "stored", "most"),
    [("float16", onnx.TensorProto.FLOAT16, 0.02), ("int8", onnx.TensorProto.INT8, 0.3)],
)
@pytest.mark.long
def test_a_converted_classifier_has_small_weights_and_the_same_classes(
    exported, images, tmp_path, precision, stored, most
):
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.read_bytes())
    said = convert_precision(path, precision, images)
    assert "on 12 images" in said
    assert said.endswith("The top-1 error is 0.00% before and 0.00% after.")

    model = onnx.load(path)
    # Count the weights of seven convolutions, six linear layers in gates, and the final layer.
    weights = Counter(each.data_type for each in model.graph.initializer if len(each.dims) > 1)
    assert weights[stored] >= 10
    sessions = [onnxruntime.InferenceSession(each) for each in (exported, path)]
    assert {each.type for each in sessions[1].get_inputs()} == {"tensor(float)"}
    metadata = [each.get_modelmeta().custom_metadata_map for each in sessions]
    assert metadata[0] == metadata[1]
    assert json.loads(metadata[1]["classes"]) == list(COLOURS)
    batch = np.concatenate(list(images.batches(images.paths())))
    before, after = (each.run(None, {"images": batch})[0] for each in sessions)
    assert np.array_equal(before.argmax(1), np.repeat([0, 1, 2], 4))
    assert np.array_equal(after.argmax(1), np.repeat([0, 1, 2], 4))
    assert 0 < np.linalg.norm(after - before) / np.linalg.norm(before) < most


def test_unlabelled_images_are_used_and_a_missing_folder_is_rejected(images, tmp_path):
    assert images.labels().tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert CalibrationImages(images.folder, images.transform, ["red", "blue"]).labels() is None
    with pytest.raises(UserError, match="There are no images in the folder"):
        CalibrationImages(str(tmp_path), images.transform).paths()
    np.save(tmp_path / "a.npy", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="There are no images in the folder"):
        CalibrationImages(str(tmp_path), images.transform).paths()


def test_a_failed_conversion_keeps_the_earlier_file(tmp_path, monkeypatch):
    cfg = load_config(str(Path(__file__).parents[2] / "configs/demo_places365_se_r18.yaml"))
    path, photos = tmp_path / "model.onnx", tmp_path / "photos"
    path.write_bytes(b"earlier")
    photos.mkdir()
    written = []

    def export_network(_, partial, **__):
        written.append(Path(partial).write_bytes(b"in float32"))
        return 0.0

    monkeypatch.setattr(write, "export_network", export_network)
    options = {"precision": "int8", "calibration": str(photos)}
    with pytest.raises(UserError, match="There are no images in the folder"):
        export_model(torch.nn.Identity(), cfg, str(path), **options)
    assert written
    assert path.read_bytes() == b"earlier"


@pytest.mark.parametrize(
    ("config", "output", "folder"),
    [
        ("configs/demo_places365_se_r18.yaml", "model.onnx", ""),
        ("configs/demo_places365_se_r18.yaml", "model.pt2", "photos"),
        ("configs/demo_faster_rcnn_se_r18.yaml", "model.onnx", "photos"),
    ],
)
def test_files_that_cannot_be_converted_are_rejected(config, output, folder, tmp_path):
    cfg = load_config(str(Path(__file__).parents[2] / config))
    options = {"precision": "int8", "calibration": folder}
    with pytest.raises(UserError, match="require a folder of images"):
        export_model(torch.nn.Identity(), cfg, str(tmp_path / output), **options)
