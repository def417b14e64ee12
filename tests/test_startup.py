"""Tests that importing the package registers Detectron2 models and loads no unneeded modules."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.long

# Modules for training, reading data, logging and exporting, which only some commands need.
HEAVY = {
    "aiohttp",
    "faster_coco_eval",
    "fsspec",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "senet_transfer.engine.trainer",
    "simplejpeg",
    "tensorboard",
    "timm",
    "torch.utils.tensorboard",
    "webdataset",
}


def modules_after(code: str) -> set[str]:
    """Run code in a new process and return the names of all modules that it loads."""
    code = f"import sys, json\n{code}\nprint(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_heavy_modules():
    assert not modules_after("import senet_transfer") & {*HEAVY, "torch", "detectron2", "numpy"}


def test_building_a_model_imports_no_more_than_it_needs():
    modules = modules_after("import senet_transfer; senet_transfer.create_backbone")
    assert "senet_transfer.models.backbones.resnet" in modules
    assert not modules & {*HEAVY, "detectron2.engine", "detectron2.evaluation"}


BUILD = """
cfg = senet_transfer.get_senet_config()
cfg.MODEL.BACKBONE.NAME = "build_senet_backbone"
cfg.MODEL.SE.ENABLED, cfg.MODEL.DEVICE = True, "cpu"
model = build_model(cfg)
assert any(name.endswith("se.fc1.weight") for name, _ in model.backbone.named_parameters())
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
for registry, name in (
    (BACKBONE_REGISTRY, "build_senet_backbone"),
    (BACKBONE_REGISTRY, "build_retinanet_senet_fpn_backbone"),
    (META_ARCH_REGISTRY, "ImageClassifier"),
    (ROI_HEADS_REGISTRY, "SENetRes5ROIHeads"),
):
    registry.get(name)
"""


REGISTER = """
from detectron2.data import DatasetCatalog
assert "shapes_val" not in DatasetCatalog
from senet_transfer.data.detection.coco import register_datasets
register_datasets([])
assert "shapes_val" in DatasetCatalog
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import senet_transfer\nfrom detectron2.modeling import build_model",
        "from detectron2.modeling import build_model\nimport senet_transfer",
    ],
    ids=["ours first", "detectron2 first"],
)
def test_importing_in_either_order_registers_models_but_not_demo_data(imports):
    modules_after(f"{imports}\n{BUILD}\n{REGISTER}")
