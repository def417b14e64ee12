"""Tests that unmodified Detectron2 detects the same objects with a converted detector."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from senet_transfer import UserError, load
from senet_transfer.config.load import load_config
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.export.conversion import convert_file
from tests.engine.conftest import SMALL

# Options for a narrow ResNet-50, whose checkpoint is about a megabyte in size.
NARROW = {
    **SMALL,
    "MODEL.SE.ENABLED": "False",
    "MODEL.RESNETS.NUM_GROUPS": "1",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
    "MODEL.RESNETS.STRIDE_IN_1X1": "True",
    "MODEL.ROI_HEADS.NUM_CLASSES": "3",
    "MODEL.PIXEL_STD": "[58.0, 57.0, 57.0]",
}
CONFIGS = ("faster_rcnn_r50", "faster_rcnn_c4_se_r50")

# Script that prints Detectron2's detections and cannot import this project.
SCRIPT = """
import json, sys
sys.modules["senet_transfer"] = None
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
results = []
for file in sys.argv[2:]:
    cfg = get_cfg()
    cfg.merge_from_file(file)
    found = DefaultPredictor(cfg)(read_image(sys.argv[1], "BGR"))["instances"]
    results.append([found.pred_boxes.tensor.tolist(), found.scores.tolist()])
print(json.dumps(results))
"""


def _run(name, folder, **overrides):
    """Save a detector with random weights and norm statistics, and its config."""
    options = {**NARROW, **overrides}
    cfg = load_config(name, [word for item in options.items() for word in item])
    torch.manual_seed(0)
    model = build_model(cfg)
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    folder.mkdir()
    Checkpointer(model, str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "model_final.pth"


@pytest.mark.long
def test_unmodified_detectron2_gives_bitwise_equal_detections(one_thread, tmp_path):
    image = tmp_path / "image.png"
    pixels = np.random.RandomState(0).randint(0, 256, (8, 10, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((100, 80), Image.BICUBIC).save(image)
    expected, files = [], []
    for name in CONFIGS:
        weights = _run(name, tmp_path / name)
        convert_file(str(weights), tmp_path / f"{name}.pkl", to="detectron2")
        files.append(str(tmp_path / f"{name}.yaml"))
        found = load(weights, device="cpu", threshold=0.0)(image)
        expected.append([found.boxes.tolist(), found.scores.tolist()])
    words = [sys.executable, "-c", SCRIPT, str(image), *files]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert all(len(scores) > 5 for _, scores in results)
    assert results == expected


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"MODEL.SE.ENABLED": "True"}, "backbone is se_resnet50.*docs/detectron2.md"),
        (
            {
                "MODEL.RESNETS.STEM_POOL": "ceil",
                "INPUT.SIZE_DIVISIBILITY": "64",
                "INPUT.EXIF": "ignore",
            },
            "INPUT.EXIF is 'ignore'.*\n.*"
            "SIZE_DIVISIBILITY is 64; expected 0.*\n.*STEM_POOL. is 'ceil'; expected 'pad'",
        ),
        ({"MODEL.BACKBONE.ARCH": "mobilenet"}, "backbone is mobilenet; expected a ResNet"),
    ],
)
@pytest.mark.long
def test_a_detector_that_detectron2_cannot_build_is_rejected(keys, words, tmp_path):
    weights = _run("faster_rcnn_r50", tmp_path / "run", **keys)
    with pytest.raises(UserError, match=words):
        convert_file(str(weights), tmp_path / "out.pkl")
    assert not list(tmp_path.glob("out.*"))
