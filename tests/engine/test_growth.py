"""Tests that memory usage and the number of open files don't grow during long runs."""

import gc
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from PIL import Image

from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.cifar.in_memory import ImageArrays
from senet_transfer.data.cifar.loader import CifarTrainLoader
from senet_transfer.data.cifar.transforms import CifarAugment
from senet_transfer.data.classification.loader import build_classification_train_loader
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection import loader as detection
from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.images.transforms import TrainTransform
from senet_transfer.data.shards.write import convert
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer

pytestmark = pytest.mark.slow

# Steps at which usage is measured. By the first step, everything is imported, cached and allocated.
LOOKED_AT = (500, 1000, 1500, 2000)
# Allowed growth in bytes. Leaking every tenth batch would use at least 5 MB by the last step.
GROWTH = 4e6


def usage() -> tuple[int, int]:
    """Return the memory in bytes and the open file count of this process and its children."""
    gc.collect()
    memory = files = 0
    pids = [os.getpid()]
    for pid in pids:
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        memory += pages * os.sysconf("SC_PAGE_SIZE")
        files += len(os.listdir(f"/proc/{pid}/fd"))
    return memory, files


def assert_flat(seen: Sequence[tuple[int, int]]) -> None:
    """Assert that memory doesn't grow steadily, and that the number of open files doesn't grow."""
    memory, files = zip(*seen, strict=True)
    growth = [after - before for before, after in itertools.pairwise(memory)]
    assert min(growth) * len(growth) < GROWTH, f"{[f'{part / 1e6:.1f} MB' for part in growth]}"
    assert files[-1] <= files[0]


@pytest.fixture
def tree(tmp_path):
    for name in ("blue", "red"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for index in range(8):
            noise = os.urandom(48 * 40 * 3)
            Image.frombytes("RGB", (48, 40), noise).save(tmp_path / "tree" / name / f"{index}.jpg")
    return tmp_path / "tree"


@pytest.fixture
def loader(tree, tmp_path, request):
    """Return a training data loader for the given kind of data and number of workers."""
    kind, workers = request.param
    if kind == "memory":
        images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
        data = ImageArrays(images, torch.arange(64) % 3, ["cat", "dog", "ship"], "drawn")
        return CifarTrainLoader(data, batch_size=8, seed=0, augment=CifarAugment(cutout=8))
    if kind == "detection":
        shapes = request.getfixturevalue("shapes")
        json_file = shapes / "annotations" / "instances_tiny.json"
        register_coco_dataset("growth", json_file, shapes / "tiny")
        cfg = get_cfg()
        cfg.DATASETS.TRAIN, cfg.INPUT.MIN_SIZE_TRAIN = ("growth",), (48, 64)
        cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, workers
        return detection.build_train_loader(cfg, CheckedDatasetMapper(cfg, is_train=True), seed=0)
    if kind == "shards":
        convert(open_folder(tree), tmp_path / "shards", split="images", shard_mb=0.02)
        tree = tmp_path / "shards"
    return build_classification_train_loader(
        open_dataset(tree),
        batch_size=4,
        transform=TrainTransform(size=16),
        seed=0,
        num_workers=workers,
        class_aware=kind == "classes",
    )


@pytest.mark.parametrize(
    "loader",
    [
        ("folder", 0),
        ("folder", 1),
        ("classes", 0),
        ("shards", 0),
        ("shards", 1),
        ("detection", 0),
        ("detection", 1),
        ("memory", 0),
    ],
    indirect=True,
)
def test_a_loader_uses_no_more_memory_after_2000_batches_than_after_a_few(loader):
    seen = []
    for count, _ in enumerate(itertools.islice(loader, LOOKED_AT[-1]), start=1):
        if count in LOOKED_AT:
            seen.append(usage())
    assert_flat(seen)


class _Watch(HookBase):
    def __init__(self):
        self.seen = []

    def after_step(self):
        # Measure usage two steps earlier, because the loader's workers stop in the last steps.
        if self.trainer.iter + 2 in LOOKED_AT:
            self.seen.append(usage())


def test_a_run_uses_no_more_memory_after_2000_steps_than_after_a_few(tree, tmp_path):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.ARCH": "cifar_resnet8",
        "MODEL.RESNETS.NORM": "BN",
        "INPUT.CLASSIFICATION.CROP": "16",
        "INPUT.CLASSIFICATION.TEST_RESIZE": "18",
        "INPUT.CLASSIFICATION.TEST_CROP": "16",
        "DATALOADER.NUM_WORKERS": "1",
        "DATASETS.TRAIN": f"('{tree}',)",
        "DATASETS.TEST": f"('{tree}',)",
        "SOLVER.IMS_PER_BATCH": "4",
        "SOLVER.BASE_LR": "0.001",
        "SOLVER.MAX_ITER": str(LOOKED_AT[-1]),
        "SOLVER.STEPS": "()",
        "SOLVER.CHECKPOINT_PERIOD": "100",
        "SOLVER.EMA.ENABLED": "True",
        "SOLVER.MAX_NONFINITE_STEPS": "1",
        "TEST.EVAL_PERIOD": "100",
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    words = ["--config-file", "configs/base/classification.yaml"]
    words += [word for item in options.items() for word in item]
    trainer = Trainer(setup(run_options(argument_parser().parse_args(words))))
    trainer.resume_or_load(resume=False)
    watch = _Watch()
    trainer.register_hooks([watch])
    trainer.train()
    assert_flat(watch.seen)
    # The five newest checkpoints are kept; one of them is model_final.pth.
    assert len(list((tmp_path / "run").glob("model_0*.pth"))) == 4
