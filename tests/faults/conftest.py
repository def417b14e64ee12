"""Fixtures that provide small datasets and training runs.

The tests write several gigabytes. Their files are in /dev/shm if it has enough space.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from senet_transfer.data.cifar.in_memory import ImageArrays, save_images, split_file
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.shapes.generate import make_shapes
from senet_transfer.data.shards.write import convert
from tests.faults import runs
from tests.small_networks import SE_RESNEXT50

# Options for all runs, which enable the features whose state is stored in checkpoints.
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    **SE_RESNEXT50,
    "DATALOADER.NUM_WORKERS": "1",
    "SOLVER.IMS_PER_BATCH": "4",
    "SOLVER.BASE_LR": "0.0005",
    "SOLVER.MAX_ITER": str(runs.ITERATIONS),
    "SOLVER.STEPS": "(7,)",
    "SOLVER.CHECKPOINT_PERIOD": str(runs.PERIOD),
    "SOLVER.EMA.ENABLED": "True",
    "DATASETS.TEST": "()",
    "SEED": "3",
}
CLASSIFICATION = {
    "MODEL.CLASSIFIER.DROPOUT": "0.3",
    "MODEL.CLASSIFIER.MIXUP": "0.2",
    "INPUT.CLASSIFICATION.CROP": "32",
    "SOLVER.AMP.ENABLED": "True",
    "SOLVER.AMP.DTYPE": "float16",
}
# Options for training on images in memory. Most network keys in SMALL do not apply here.
MEMORY = {f"MODEL.RESNETS.{key}": None for key in ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP")}
MEMORY |= {f"MODEL.RESNETS.{key}_OUT_CHANNELS": None for key in ("STEM", "RES2")}
MEMORY |= {
    "MODEL.BACKBONE.ARCH": "se_cifar_resnet8",
    "MODEL.RESNETS.NORM": "BN",
    "INPUT.CLASSIFICATION.CUTOUT": "8",
    "SOLVER.AMP.ENABLED": "False",
}
DETECTION = {
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "20",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "INPUT.MIN_SIZE_TRAIN": "(48, 64)",
    "INPUT.MAX_SIZE_TRAIN": "80",
    "SOLVER.IMS_PER_BATCH": "2",
    "DATASETS.TRAIN": "('own',)",
}


@pytest.fixture(scope="session")
def disk():
    """Yield a folder for all files of the tests, and delete it after the last test."""
    in_memory = "/dev/shm"
    free = shutil.disk_usage(in_memory).free if os.path.isdir(in_memory) else 0
    with tempfile.TemporaryDirectory(
        prefix="faults-", dir=in_memory if free > 2e9 else None
    ) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def words(disk):
    """Write small datasets, and return arguments of train_net.py for runs on these datasets.

    The argument lists are keyed by the kind of run, such as "shards" or "detection".
    """
    tree, shards = disk / "tree", disk / "shards"
    random = np.random.RandomState(0)
    for name in ("blue", "green", "red"):
        (tree / name).mkdir(parents=True)
        for index in range(6):
            pixels = random.randint(0, 255, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tree / name / f"{index}.jpg", quality=80)
    shards.mkdir()
    convert(open_folder(tree), shards, split="images", shard_mb=0.02)
    shapes = make_shapes(disk / "shapes", train=8, val=4)
    own = ["--dataset", "own", f"{shapes}/annotations/instances_tiny.json", f"{shapes}/tiny"]

    def line(config: str, *flags: str, **keys: str | None) -> list[str]:
        kept = ((key, value) for key, value in {**SMALL, **keys}.items() if value is not None)
        options = [word for item in kept for word in item]
        return ["--config-file", config, *flags, *options]

    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    data = ImageArrays(images, torch.arange(24) % 3, ["cat", "dog", "ship"], "drawn")
    save_images(data, split_file(disk / "cifar10", "train"), "drawn")
    classifier, detector = "configs/base/classification.yaml", "configs/faster_rcnn_se_r50.yaml"
    memory = {**CLASSIFICATION, **MEMORY, "DATASETS.TRAIN": f"('{disk}/cifar10',)"}
    return {
        "folder": line(classifier, **CLASSIFICATION, **{"DATASETS.TRAIN": f"('{tree}',)"}),
        "shards": line(classifier, **CLASSIFICATION, **{"DATASETS.TRAIN": f"('{shards}',)"}),
        "memory": line("configs/base/cifar10.yaml", **memory),
        "detection": line(detector, *own, **DETECTION),
        # The run draws a random seed at its start and stores it in its checkpoints.
        "unseeded": line(detector, *own, **DETECTION, SEED="-1"),
    }


@pytest.fixture
def work(words, disk):
    """Yield a function that creates a run; delete the run's output folder after the test.

    The function's arguments are a key of ``words`` and additional command-line arguments.
    """
    folder = Path(tempfile.mkdtemp(dir=disk))
    yield lambda kind, *options: runs.Work(folder / "run", [*words[kind], *options])
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def straight(words, disk):
    """Return a function that trains without interruption and returns the run and its duration."""
    done: dict[tuple[str, int], tuple[runs.Work, float]] = {}

    def run(kind: str, ranks: int = 1) -> tuple[runs.Work, float]:
        if (kind, ranks) not in done:
            unbroken = runs.Work(disk / f"straight_{kind}_{ranks}", words[kind])
            begin = time.monotonic()
            processes = unbroken.start_ranks(ranks=ranks) if ranks > 1 else [unbroken.start()]
            unbroken.wait_for("Starting training", processes[0])
            began = time.monotonic()
            assert [runs.end_of(process) for process in processes] == [0] * ranks, unbroken.output()
            unbroken.assert_clean()
            assert time.monotonic() - begin < runs.LIMIT
            done[kind, ranks] = unbroken, time.monotonic() - began
        return done[kind, ranks]

    return run


@pytest.fixture
def half(work, straight):
    """Return a function that creates the files of a run that ended after its third checkpoint."""

    def make(kind: str) -> runs.Work:
        begun, whole = work(kind), straight(kind)[0].folder
        begun.folder.mkdir()
        names = [f"model_{number:07d}.pth" for number in (2, 5, 8)]
        for name in [*names, *(f"{name}.sha256" for name in names), "config.yaml", "metrics.json"]:
            shutil.copy(whole / name, begun.folder / name)
        (begun.folder / "recent_checkpoints").write_text("".join(f"{name}\n" for name in names))
        (begun.folder / "last_checkpoint").write_text(names[-1])
        return begun

    return make
