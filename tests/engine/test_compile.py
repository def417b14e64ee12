"""Tests for training with ``torch.compile``."""

import shutil

import pytest
import torch

from senet_transfer import UserError
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.cifar.in_memory import ImageArrays, save_images, split_file
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from tests.comparing import assert_same


@pytest.fixture
def train(tmp_path):
    """Return a function that trains a small network and returns its losses and final checkpoint."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageArrays(images, torch.arange(32) % 3, ["cat", "dog", "ship"], "test")
    for split in ("train", "test"):
        save_images(data, split_file(tmp_path / "images", split), "test")

    def run(folder, *flags, **options):
        keys = {
            "MODEL.DEVICE": "cpu",
            "MODEL.BACKBONE.ARCH": "se_cifar_resnet8",
            "SOLVER.EPOCHS": "None",
            "SOLVER.MAX_ITER": "4",
            "SOLVER.STEPS": "()",
            "SOLVER.CHECKPOINT_PERIOD": "2",
            "DATASETS.TRAIN": f"('{tmp_path}/images',)",
            "DATASETS.TEST": "()",  # evaluation would compile the network again
            "OUTPUT_DIR": str(folder),
            **options,
        }
        words = ["--config-file", "configs/instant/cifar10_se_resnet20.yaml", *flags]
        words += [word for item in keys.items() for word in item]
        trainer = Trainer(setup(run_options(argument_parser().parse_args(words))))
        trainer.resume_or_load(resume="--resume" in flags)
        trainer.train()
        losses = [value for value, _ in trainer.storage.history("total_loss").values()]
        return losses, torch.load(folder / "model_final.pth", weights_only=True)

    return run


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_with_unchanged_checkpoints(train, tmp_path):
    plain, expected = train(tmp_path / "plain")
    compiled, found = train(tmp_path / "compiled", **{"SOLVER.COMPILE": "default"})
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert compiled != plain  # sums are computed in a different order
    assert list(found["model"]) == list(expected["model"])
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=1e-2, atol=1e-3, msg=name)

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for name in ("model_0000001.pth", "config.yaml"):
        shutil.copy(tmp_path / "compiled" / name, resumed / name)
    (resumed / "last_checkpoint").write_text("model_0000001.pth")
    losses, again = train(resumed, "--resume", **{"SOLVER.COMPILE": "default"})
    assert losses == compiled[2:]
    assert_same(again["model"], found["model"])


def test_an_unknown_compile_mode_is_rejected(train, tmp_path):
    with pytest.raises(UserError, match="SOLVER.COMPILE is 'fast'; expected one of: none, default"):
        train(tmp_path / "run", **{"SOLVER.COMPILE": "fast"})
