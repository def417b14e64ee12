"""Tests that the scripts in docs/detectron2.md give the same detections as this project."""

import re
import runpy
from pathlib import Path

import detectron2.config
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from PIL import Image

from senet_transfer import load
from tests.engine.predictor.conftest import NARROW, SMALL_DETECTOR, saved

PAGE = (Path(__file__).parents[2] / "docs" / "detectron2.md").read_text()

# Substitute for Detectron2's demo/demo.py, with the same steps to build the predictor.
DEMO = """
import sys
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.merge_from_list(["MODEL.WEIGHTS", sys.argv[2]])
cfg.freeze()
predictor = DefaultPredictor(cfg)
"""


def _script(word):
    """Return the first Python block in docs/detectron2.md that contains the given word."""
    return next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if word in code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a test image, and with an SE detector in its subfolder ``output``."""
    folder = tmp_path_factory.mktemp("scripts")
    options = {**SMALL_DETECTOR, **NARROW, "MODEL.ROI_HEADS.NUM_CLASSES": "3"}
    saved("configs/faster_rcnn_se_r50.yaml", options, folder / "output")
    pixels = np.random.RandomState(0).randint(0, 256, (8, 10, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((100, 80), Image.BICUBIC).save(folder / "image.png")
    return folder


@pytest.fixture
def expected(folder, one_thread, monkeypatch):
    """Return this project's detections for the test image.

    The working directory is changed to ``folder``.
    """
    monkeypatch.chdir(folder)
    found = load("output/model_final.pth", device="cpu", threshold=0.0)("image.png")
    assert len(found.scores) > 5
    return found


def _check(predictor: DefaultPredictor, expected):
    found = predictor(read_image("image.png", "BGR"))["instances"]
    assert torch.equal(found.pred_boxes.tensor, torch.as_tensor(expected.boxes))
    assert torch.equal(found.scores, torch.as_tensor(expected.scores))


@pytest.mark.long
def test_the_scripts_for_detectron2_give_bitwise_equal_detections(expected, folder, monkeypatch):
    names: dict = {}
    exec(_script("= senet_transfer.get_senet_config()"), names)
    _check(names["predictor"], expected)

    (folder / "demo").mkdir()
    (folder / "demo" / "demo.py").write_text(DEMO)
    monkeypatch.setattr(detectron2.config, "get_cfg", detectron2.config.get_cfg)
    monkeypatch.setattr("sys.argv", ["", "output/config.yaml", "output/model_final.pth"])
    ran: list[dict] = []
    run = runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda *a, **k: ran.append(run(*a, **k)))
    exec(_script("demo/demo.py"), {})
    _check(ran[0]["predictor"], expected)


@pytest.mark.long
def test_the_script_for_sahi_gives_the_same_detections(expected):
    pytest.importorskip("sahi", reason="SAHI is not installed (pip install --no-deps sahi)")
    names: dict = {}
    exec(_script("sahi"), names)
    from sahi.predict import get_prediction

    names["model"].confidence_threshold = 0.0
    objects = get_prediction("image.png", names["model"]).object_prediction_list
    scores = sorted((item.score.value for item in objects), reverse=True)
    assert scores == pytest.approx(expected.scores[: len(scores)].tolist())
    assert len(scores) > 5
