"""Tests that compare dataset statistics with Detectron2's results and with manual counts."""

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from senet_transfer.analysis.dataset_page.charts import image_charts
from senet_transfer.analysis.dataset_page.splits import Objects, Split, read_objects
from senet_transfer.analysis.dataset_page.statistics import (
    anchor_fit,
    best_overlaps,
    imbalance,
    shares,
    training_scale,
)
from senet_transfer.config.load import load_config


def test_shares_counts_every_value_once():
    edges = np.array([0, 1, 2, 4])
    assert shares(np.array([-5.0, 0.5, 1.0, 3.9, 4.0, 99.0]), edges).tolist() == pytest.approx(
        [100 * 2 / 6, 100 / 6, 100 * 3 / 6]
    )
    assert shares(np.array([]), edges).tolist() == [0, 0, 0]


def test_imbalance_ignores_absent_classes():
    assert imbalance(np.array([30, 0, 3])) == 10
    assert imbalance(np.array([0, 0])) == 1


def test_objects_and_classes_are_counted_without_crowds():
    xywh, xyxy = BoxMode.XYWH_ABS, BoxMode.XYXY_ABS
    records = [
        {"width": 9, "height": 8, "annotations": [
            {"bbox": [1, 2, 3, 4], "bbox_mode": xywh, "category_id": 1},
            {"bbox": [1, 2, 3, 4], "bbox_mode": xyxy, "category_id": 1},
            {"bbox": [0, 0, 9, 8], "bbox_mode": xywh, "category_id": 0, "iscrowd": 1}]},
        {"width": 7, "height": 6, "annotations": []},
        {"width": 7, "height": 6, "annotations": [
            {"bbox": [0, 0, 1, 1], "bbox_mode": xywh, "category_id": 2}]},
    ]  # fmt: skip
    objects = read_objects(records)
    assert objects.boxes.tolist() == [[1, 2, 4, 6], [1, 2, 3, 4], [0, 0, 1, 1]]
    assert objects.counts.tolist() == [2, 0, 1]
    split = Split("a", "training data", True, "xyz", None, [], objects)
    images, counts = split.class_counts()
    assert images.tolist() == [0, 1, 1]
    assert counts.tolist() == [0, 2, 1]


@pytest.mark.parametrize("border", [-1, 0, 20])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_best_overlaps_equal_a_comparison_with_all_anchors_of_detectron2(border, offset):
    strides, size, divisor = (8, 32), (150, 101), 32
    generator = DefaultAnchorGenerator(
        sizes=[[20, 40], [90]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=strides, offset=offset
    )
    random = np.random.default_rng(0)
    corner = random.uniform(-5, 95, (200, 2))
    boxes = np.concatenate([corner, corner + random.uniform(1, 80, (200, 2))], axis=1)
    height, width = (-(-side // divisor) * divisor for side in size[::-1])
    grids = [torch.zeros(1, 1, height // stride, width // stride) for stride in strides]
    anchors = Boxes.cat(generator(grids))
    if border >= 0:
        anchors = anchors[anchors.inside_box(size[::-1], border)]
    expected = pairwise_iou(Boxes(torch.from_numpy(boxes).float()), anchors).max(1).values
    found = best_overlaps(boxes, np.tile(size, (200, 1)), generator, divisor=divisor, border=border)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.long
def test_objects_are_compared_with_the_config_s_anchors_in_the_resized_image():
    cfg = load_config("finetune_detector", ["INPUT.MIN_SIZE_TRAIN", "(640,)"])
    sizes = np.array([[640, 320]])
    assert training_scale(cfg, sizes).tolist() == [[1066 / 640, 533 / 320]]
    jitter = load_config("finetune_detector", ["INPUT.LARGE_SCALE_JITTER.ENABLED", "True"])
    assert training_scale(jitter, sizes).tolist() == [[1024 / 640] * 2]
    # In the resized image, the first box equals the 64-pixel anchor at (320, 320) on the level with
    # stride 8. The second box is twice as elongated as the most elongated anchor.
    scale = 1066 / 640
    boxes = np.array([[288, 288, 352, 352], [4, 4, 9, 5]]) / scale
    objects = Objects(boxes, np.array([0, 1]), np.array([0, 0]), sizes)
    fit = anchor_fit(cfg, objects)
    assert fit.overlaps[0] == pytest.approx(1, abs=0.02)
    assert fit.overlaps[1] < 0.01
    assert fit.labels.tolist() == [1, 0]
    assert list(fit.thresholds) == [0.3, 0.7]
    fcos = cfg.clone()
    fcos.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    assert anchor_fit(fcos, objects) is None


def test_charts_are_only_of_sizes_that_differ():
    same = np.full((5, 2), 64)
    assert image_charts(["a"], [same]) == []
    size, ratio = image_charts(["a", "b"], [same, np.array([[64, 64], [256, 16], [16, 16]])])
    assert [size["labels"][0], size["labels"][-1]] == ["16", "64"]
    assert [series["values"][-1] for series in size["series"]] == pytest.approx([100, 200 / 3])
    assert ratio["series"][1]["values"][ratio["labels"].index("16")] == pytest.approx(100 / 3)
