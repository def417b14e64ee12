"""Tests for the deprecated import paths of version 0.1, which work for one more release."""

import importlib
import sys

import pytest

from senet_transfer._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_warns_and_exports_the_objects_of_the_new_one(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED[old]}"):
        module = importlib.import_module(old)
    current = importlib.import_module(MOVED[old])
    names = [name for name in dir(current) if not name.startswith("_")]
    assert names
    assert all(getattr(module, name) is getattr(current, name) for name in names)


def test_old_imports_work_and_the_warning_names_their_line(run_python):
    code = (
        "from senet_transfer.backbones import create_backbone, list_models\n"
        "from senet_transfer.backbones.registry import register_with_se\n"
        "from senet_transfer.classification import create_classifier\n"
        "from senet_transfer.weights import detect, names, FAMILIES\n"
        "from senet_transfer.weights.families import Family\n"
        "from senet_transfer.weights.geometry import Geometry\n"
        "from senet_transfer.data.coco import register_coco_dataset\n"
        "from senet_transfer.layers import SEOptions\n"
        "from senet_transfer.config import get_senet_config\n"
        "import senet_transfer.backbones.vgg as vgg\n"
        "print(vgg.VGGBlock.__module__)\n"
    )
    done = run_python("-c", f"import warnings; warnings.simplefilter('always'); exec({code!r})")
    assert done.stdout == "senet_transfer.models.backbones.vgg\n"
    assert "<string>:1: DeprecationWarning: senet_transfer.backbones has moved" in done.stderr
