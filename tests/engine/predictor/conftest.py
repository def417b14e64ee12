"""Fixtures that save a small detector, a small classifier and a few images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image

from senet_transfer.config.load import load_config
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from tests.engine.classification.conftest import SMALL as SMALL_CLASSIFIER
from tests.engine.conftest import SMALL as SMALL_DETECTOR

# Options for an SE-ResNet-18 with a quarter of the usual width.
NARROW = {
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.NUM_GROUPS": "1",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "64",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "16",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "16",
}
CLASSES = ["a/airfield", "b/bar", "c/canyon"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test in this folder with one torch thread."""


def saved(config: str, options: dict[str, str], folder: Path) -> CfgNode:
    """Save a network with random weights and its config, as at the end of a training run."""
    torch.manual_seed(0)
    cfg = load_config(config, [word for item in options.items() for word in item])
    folder.mkdir(parents=True)
    cfg.DATASETS.CLASSES = CLASSES
    Checkpointer(build_model(cfg), str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg


@pytest.fixture(scope="session")
def detector(tmp_path_factory) -> Path:
    """Return the output folder of an untrained Mask R-CNN, whose detections have low scores."""
    folder = tmp_path_factory.mktemp("runs") / "detector"
    options = {
        **SMALL_DETECTOR,
        **NARROW,
        "MODEL.ROI_HEADS.NUM_CLASSES": "3",
        "TEST.DETECTIONS_PER_IMAGE": "4",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": "1",
        "MODEL.ROI_MASK_HEAD.CONV_DIM": "16",
    }
    saved("configs/mask_rcnn_se_r50.yaml", options, folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """Return the output folder of an untrained classifier with the classes in ``CLASSES``."""
    folder = tmp_path_factory.mktemp("runs") / "classifier"
    options = {**SMALL_CLASSIFIER, **NARROW, "MODEL.CLASSIFIER.NUM_CLASSES": "3"}
    saved("configs/base/classification.yaml", options, folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Return a folder with five JPEG images of two sizes, including two in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for index, name in enumerate(("a", "b", "c", "sub/a", "sub/d")):
        pixels = random.randint(0, 256, (6, 8 - index % 2, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((80 - 10 * (index % 2), 60), Image.BICUBIC)
        path = folder / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=95)
    return folder
