"""Tests that every smoke-test config can be trained, saved and evaluated."""

from pathlib import Path

import pytest

from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.shapes.class_folders import make_shape_classes
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "instant").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_smoke_test_config_runs_to_its_end(path, shapes, tmp_path):
    if "instant_classification" in path.read_text():
        own, name = [], str(make_shape_classes(shapes, tmp_path / "classes"))
    else:
        own = ["--dataset", "tiny", f"{shapes}/annotations/instances_tiny.json", f"{shapes}/tiny"]
        name = "tiny"
    data = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    words = ["--config-file", str(path), *own, *data, "OUTPUT_DIR", str(tmp_path)]
    trainer = Trainer(setup(run_options(argument_parser().parse_args(words))))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    assert {"bbox", "classification"} & set(trainer.results)
