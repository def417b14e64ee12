"""Tests that tools/classify_onnx.py reads and resizes images as in evaluation."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image
from torchvision.transforms import functional as F

from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.decode import Reading, decode_exact
from senet_transfer.data.images.transforms import EvalTransform

pytest.importorskip("onnxruntime")
TOOLS = Path(__file__).parents[2] / "tools"
SCRIPT = runpy.run_path(str(TOOLS / "classify_onnx.py"))
SHARED = runpy.run_path(str(TOOLS / "onnx_images.py"))


@pytest.mark.parametrize("resize", [224, 235, 256, 299])
@pytest.mark.parametrize("short", [1, 3, 97, 333, 480, 768, 1537])
@pytest.mark.long
def test_sizes_equal_torchvisions_for_every_side(resize, short):
    resized = SCRIPT["resized"]
    for side in range(1, 5001):
        for width, height in ((short, side), (side, short), (side, side)):
            image = SimpleNamespace(size=(width, height), width=width, height=height)
            expected = F._compute_resized_output_size((height, width), [resize])
            assert resized(image, resize, "short_side") == tuple(expected[::-1])


@pytest.mark.parametrize("mode", ["short_side", "squash", "ten_crop"])
@pytest.mark.parametrize("size", [(90, 131), (131, 90), (64, 64), (77, 233), (20, 30)])
def test_views_equal_those_of_the_evaluation(tmp_path, mode, size):
    path = tmp_path / "image.png"
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    preprocessing = {"resize": 37, "interpolation": "bilinear"}
    found = SCRIPT["load"](str(path), preprocessing, (32, 32), mode)
    expected = EvalTransform(mode=mode, resize=37, crop=32)(path.read_bytes()).numpy()
    expected = expected.reshape(-1, 3, 32, 32)
    # Compare in any order, because the order of the ten crops does not affect their mean.
    assert sorted(view.tobytes() for view in found.astype(np.uint8)) == sorted(
        view.tobytes() for view in expected
    )


@pytest.mark.parametrize("value_range", [(), (100, 3000)])
@pytest.mark.parametrize("kind", ["grey16.png", "grey16.pgm", "grey16.tif", "float.tif", "rgb.png"])
def test_pixels_equal_those_of_the_evaluation(tmp_path, kind, value_range):
    values = np.random.RandomState(0).randint(0, 65536, (7, 9), np.uint16)
    pixels = {"float.tif": values.astype(np.float32), "rgb.png": np.stack([values % 256] * 3, 2)}
    stored = pixels.get(kind, values)
    path = tmp_path / kind
    Image.fromarray(stored.astype(np.uint8) if kind == "rgb.png" else stored).save(path)
    if kind == "float.tif" and not value_range:
        with pytest.raises(SystemExit, match="has 32 bits per channel"):
            SHARED["read_image"](str(path), value_range)
        return
    found = np.asarray(SHARED["read_image"](str(path), value_range).convert("RGB"))
    expected = np.asarray(decode_exact(path.read_bytes(), Reading(value_range)))
    assert np.array_equal(found, expected)


def test_rotated_images_are_upright_and_unusable_ones_are_rejected(tmp_path):
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)).save(
        path, exif=exif
    )
    found = np.asarray(SHARED["read_image"](str(path), upright=True).convert("RGB"))
    assert np.array_equal(found, read_image(str(path), "RGB"))
    wide = tmp_path / "wide.png"
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(wide, exif=exif)
    found = np.asarray(SHARED["read_image"](str(wide), (0, 4095), upright=True).convert("RGB"))
    assert np.array_equal(found, read_image(str(wide), "RGB", Reading((0, 4095), upright=True)))
    deep = tmp_path / "deep.png"
    cv2.imwrite(str(deep), np.full((4, 4, 3), 3000, np.uint16))
    with pytest.raises(SystemExit, match="has more than 8 bits per channel"):
        SHARED["read_image"](str(deep), (0, 4095))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SystemExit, match="can't be read as an image"):
        SHARED["read_image"](str(path))


def test_a_file_for_another_task_is_rejected(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "graph", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    helper.set_model_props(model, {"task": '"detection"', "classes": "[]"})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SystemExit, match="is detection; expected classification"):
        SHARED["open_model"](str(path), "classification")
    helper.set_model_props(model, {"classes": "{0: 'person'}"})  # as in other programs' exports
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SystemExit, match="is unknown; expected classification"):
        SHARED["open_model"](str(path), "classification")
    with pytest.raises(SystemExit, match="can't be read as an ONNX file"):
        SHARED["open_model"](str(tmp_path / "missing.onnx"), "detection")


def test_models_with_other_channels_are_rejected(monkeypatch):
    metadata = {"preprocessing": {"format": "C4"}, "classes": []}
    monkeypatch.setitem(SCRIPT["main"].__globals__, "open_model", lambda *_: (None, metadata))
    with pytest.raises(SystemExit, match="format C4; expected RGB, BGR or L. Use tools/predict.py"):
        SCRIPT["main"]("model.onnx", "image.tif")
