"""What starting up imports: little beyond what Detectron2's own models need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Readers of data, writers of logs, exporters: each is needed by some commands alone.
HEAVY = (
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
)

HELP = """
import runpy
sys.argv = ["tools/train_net.py", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    ("code", "also"),
    [("import senet_transfer", ("detectron2.engine", "detectron2.evaluation")), (HELP, ())],
    ids=["import", "--help"],
)
def test_starting_up_imports_no_more_than_it_needs(code, also):
    code = f"import sys, json\n{code}\nprint(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "senet_transfer.models.backbones.resnet" in modules
    assert not modules & {*HEAVY, *also}
