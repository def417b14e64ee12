"""Fixtures for small classification datasets and for training runs on them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.shards.write import convert
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from tests.small_networks import SE_RESNEXT50

CLASSES = ("blue", "green", "nested/blue", "red")
PER_CLASS = 6

SMALL = {
    "MODEL.DEVICE": "cpu",
    **SE_RESNEXT50,
    "INPUT.CLASSIFICATION.CROP": "32",
    "INPUT.CLASSIFICATION.TEST_RESIZE": "36",
    "INPUT.CLASSIFICATION.TEST_CROP": "32",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "4",
    "SOLVER.BASE_LR": "0.0005",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.STEPS": "()",
    "SOLVER.CHECKPOINT_PERIOD": "2",
    "SEED": "3",
}

# Options for training with batch norm. With 32x32 images, the last feature map is 1x1, so each
# channel is normalised over one value per image: with two images, the gradient norm reaches 1e8 and
# training diverges. With 96x96 images, the map is 3x3 and the gradient norm stays below 1e3.
BATCH_NORM = {
    "MODEL.RESNETS.NORM": "BN",
    "INPUT.CLASSIFICATION.CROP": "96",
    "INPUT.CLASSIFICATION.TEST_RESIZE": "108",
    "INPUT.CLASSIFICATION.TEST_CROP": "96",
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test in this folder with one torch thread."""


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = random.randint(0, 120, (5, 6, 3))
            pixels[..., label % 3] += 100
            image = Image.fromarray(pixels.astype(np.uint8)).resize((48, 40), Image.BILINEAR)
            image.save(root / name / f"{index}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def shards(tree, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("shards")
    convert(open_folder(tree), output, split="images", shard_mb=0.02)
    assert len(list(output.glob("*.tar"))) > 2
    return output


@pytest.fixture
def words(tree, tmp_path):
    """Return a function that builds a small run's command line from flags and config overrides."""

    def make(*flags: str, config: str = "configs/base/classification.yaml", **overrides: str):
        keys = {**SMALL, "OUTPUT_DIR": str(tmp_path / "run")}
        keys |= {f"DATASETS.{which}": f"('{tree}',)" for which in ("TRAIN", "TEST")}
        keys |= overrides
        return ["--config-file", config, *flags, *(word for item in keys.items() for word in item)]

    return make


@pytest.fixture
def command(words):
    """Return a function that builds a small run's options from flags and config overrides."""
    return lambda *flags, **overrides: run_options(
        argument_parser().parse_args(words(*flags, **overrides))
    )


@pytest.fixture
def train(command):
    """Return a function that trains with flags and config overrides, and returns the trainer."""

    def run(*flags: str, **overrides: str) -> Trainer:
        args = command(*flags, **overrides)
        trainer = Trainer(setup(args))
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return trainer

    return run
