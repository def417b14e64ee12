"""Every recipe's instant twin trains, saves and evaluates."""

from pathlib import Path

import pytest

from senet_transfer.engine.arguments import argument_parser
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "instant").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_instant_twin_runs_to_its_end(path, shapes, tmp_path):
    own = ["--dataset", "tiny", f"{shapes}/annotations/instances_tiny.json", f"{shapes}/tiny"]
    data = ["DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"]
    words = ["--config-file", str(path), *own, *data, "OUTPUT_DIR", str(tmp_path)]
    trainer = Trainer(setup(argument_parser().parse_args(words)))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    assert "bbox" in trainer._last_eval_results
