"""Fixtures that provide a small dataset of synthetic shapes and options for training on it."""

import pytest

from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.shapes.generate import make_shapes
from tests.small_networks import SE_RESNEXT50

SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    **SE_RESNEXT50,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "20",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "96",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.0025",
    "SOLVER.MAX_ITER": "4",
    "SOLVER.STEPS": "(3,)",
    "SOLVER.CHECKPOINT_PERIOD": "2",
    "SEED": "1",
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=8, val=4)


@pytest.fixture
def command(shapes, tmp_path):
    """Return a function that creates a small run's ``RunOptions`` from flags and config keys."""

    def make(*flags: str, config: str = "configs/faster_rcnn_se_r50.yaml", **overrides: str):
        keys = {**SMALL, "OUTPUT_DIR": str(tmp_path / "run"), **overrides}
        keys.setdefault("DATASETS.TRAIN", "('own',)")
        keys.setdefault("DATASETS.TEST", "('own',)")
        own = ["--dataset", "own", f"{shapes}/annotations/instances_tiny.json", f"{shapes}/tiny"]
        words = ["--config-file", config, *flags, *own]
        words += [word for item in keys.items() for word in item]
        return run_options(argument_parser().parse_args(words))

    return make
