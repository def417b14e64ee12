"""The images that tools/classify_onnx.py passes to a network, compared with torchvision."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as F

from senet_transfer.data.images.transforms import EvalTransform

pytest.importorskip("onnxruntime")
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "classify_onnx.py"))


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
    # The order of the ten crops has no effect on their mean.
    assert sorted(view.tobytes() for view in found.astype(np.uint8)) == sorted(
        view.tobytes() for view in expected
    )
