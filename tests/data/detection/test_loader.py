"""Tests for the detection loader: reproducible batches, aspect ratio grouping and errors."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler

from senet_transfer import UserError
from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.loader import (
    PlannedBatches,
    build_test_loader,
    build_train_loader,
    seeded_rng,
)
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.shapes.generate import make_shapes

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=12, val=2)


@pytest.fixture
def loader(folder):
    """Return a function that loads a number of batches, starting at the given iteration."""
    register_coco_dataset("own", folder / "annotations" / "instances_train.json", folder / "train")
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("own",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.SOLVER.IMS_PER_BATCH = (48, 64, 80), 3

    def batches(count, *, workers=0, seed=5, start_iter=0):
        cfg.DATALOADER.NUM_WORKERS = workers
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        row = build_train_loader(cfg, mapper, seed=seed, start_iter=start_iter)
        return list(itertools.islice(row, count))

    batches.cfg = cfg
    return batches


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [image["image_id"] for image in one] == [image["image_id"] for image in other]
        for image, again in zip(one, other, strict=True):
            assert torch.equal(image["image"], again["image"])
            boxes, others = image["instances"].gt_boxes, again["instances"].gt_boxes
            assert torch.equal(boxes.tensor, others.tensor)


@pytest.mark.long
def test_a_batch_depends_only_on_seed_and_iteration(loader):
    straight = loader(6)
    assert_same(loader(6, workers=2), straight)
    assert_same(loader(2, workers=1, start_iter=4), straight[4:])
    others = [image["image_id"] for batch in loader(4, seed=6) for image in batch]
    assert others != [image["image_id"] for batch in straight[:4] for image in batch]


def test_batches_are_grouped_by_aspect_ratio_as_in_detectron2():
    records = [{"width": w, "height": h} for w, h in ((4, 3), (3, 4), (5, 2), (2, 2), (3, 9))]
    sampler = TrainingSampler(len(records), seed=3)
    wide = lambda index: records[index]["width"] > records[index]["height"]  # noqa: E731
    theirs = AspectRatioGroupedDataset((records[index] for index in sampler), 2)
    ours = PlannedBatches(sampler, batch_size=2, is_wide=wide)
    for batch, expected in zip(itertools.islice(ours, 40), theirs, strict=False):
        assert [records[index] for _, index in batch] == expected


def test_global_random_state_is_not_changed():
    np.random.seed(1)
    torch.manual_seed(1)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with seeded_rng(7, 8):
        drawn = np.random.rand(), torch.rand(1)
    with seeded_rng(7, 8):
        assert (np.random.rand(), torch.rand(1)) == drawn
    assert (np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize(
    ("steps", "passes", "warned"),
    [(2000, "500 epochs", False), (2001, "500 epochs", True), (180000, "45000 epochs", True)],
)
@pytest.mark.long
def test_a_schedule_with_many_passes_over_the_data_is_reported(
    loader, caplog, steps, passes, warned
):
    loader.cfg.SOLVER.MAX_ITER = steps
    with caplog.at_level("INFO", logger="senet_transfer"):
        loader(1)
    (said,) = [record for record in caplog.records if "epochs of" in record.message]
    assert passes in said.message
    assert (said.levelname == "WARNING") == warned
    assert ("SOLVER.MAX_ITER" in said.message) == warned


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("build", ["train", "test"])
def test_a_user_error_of_a_worker_is_raised_unchanged(folder, build, workers):
    register_coco_dataset("own", folder / "annotations" / "instances_train.json", folder / "train")
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH = ("own",), 2
    cfg.DATALOADER.NUM_WORKERS = workers

    def broken(record):
        raise UserError("x.jpg is broken")

    if build == "train":
        loader = build_train_loader(cfg, broken, seed=1)
    else:
        loader = build_test_loader(cfg, "own", broken)
        assert len(loader) == 12
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    assert str(caught.value) == "x.jpg is broken"


def test_other_errors_of_a_worker_keep_its_traceback(folder):
    register_coco_dataset("own", folder / "annotations" / "instances_train.json", folder / "train")
    cfg = get_cfg()
    cfg.DATALOADER.NUM_WORKERS = 1

    def mistaken(record):
        return record.no_such_attribute

    with pytest.raises(AttributeError, match="in mistaken"):
        next(iter(build_test_loader(cfg, "own", mistaken)))
