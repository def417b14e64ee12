"""Tests that compare the operators for rotated boxes with OpenCV and torchvision."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.layers import batched_nms_rotated, nms_rotated, roi_align_rotated
from detectron2.structures import RotatedBoxes, pairwise_iou_rotated
from torchvision.ops import nms, roi_align

import senet_transfer.models  # noqa: F401  # registers the operators
from senet_transfer.layers import rotated_boxes


def random_boxes(count: int, seed: int, size: float = 60.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=random) * size
    sides = torch.rand(count, 2, generator=random) * 30 + 1
    angle = torch.rand(count, 1, generator=random) * 720 - 360
    return torch.cat([centre, sides, angle], 1)


def test_every_operator_is_registered_when_the_models_are_imported():
    for name in ("box_iou_rotated", "nms_rotated", "roi_align_rotated_forward"):
        assert hasattr(torch.ops.detectron2, name)
    assert rotated_boxes.define_missing_operators() == []


def test_the_iou_of_random_boxes_equals_opencvs():
    first, second = random_boxes(40, 1), random_boxes(50, 2)
    found = pairwise_iou_rotated(RotatedBoxes(first), RotatedBoxes(second))
    expected = np.zeros((40, 50))
    for i, one in enumerate(first.tolist()):
        for j, other in enumerate(second.tolist()):
            # OpenCV's angles are clockwise.
            rects = [((x, y), (w, h), -angle) for x, y, w, h, angle in (one, other)]
            _, corners = cv2.rotatedRectangleIntersection(*rects)
            if corners is not None:
                common = cv2.contourArea(cv2.convexHull(corners))
                expected[i, j] = common / (one[2] * one[3] + other[2] * other[3] - common)
    assert (expected > 0.05).sum() > 100
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("one", "other", "iou"),
    [
        ((5, 3, 4, 2, 0), (5, 3, 4, 2, 180), 1),
        ((5, 3, 4, 2, -90), (5, 3, 2, 4, 0), 1),
        ((0, 0, 2, 2, 0), (1, 0, 2, 2, 0), 1 / 3),
        # The intersection of a square and the same square rotated by 45 degrees is an octagon.
        ((0, 0, 2, 2, 0), (0, 0, 2, 2, 45), (8 * 2**0.5 - 8) / (16 - 8 * 2**0.5)),
        ((0, 0, 2, 2, 0), (2, 0, 2, 2, 0), 0),
        ((0, 0, 10, 10, 30), (0, 0, 2, 5, 77), 0.1),
        ((0, 0, 0, 5, 0), (0, 0, 2, 5, 0), 0),
        ((1e6, 1e6, 2, 2, 0), (1e6 + 1, 1e6, 2, 2, 0), 1 / 3),
    ],
)
def test_the_iou_of_simple_boxes(one, other, iou):
    boxes = [RotatedBoxes(torch.tensor([box], dtype=torch.float64)) for box in (one, other)]
    assert pairwise_iou_rotated(*boxes).item() == pytest.approx(iou, abs=1e-6)


def test_the_iou_of_no_boxes_is_empty():
    assert pairwise_iou_rotated(
        RotatedBoxes(torch.zeros(0, 5)), RotatedBoxes(torch.ones(3, 5))
    ).shape == (0, 3)


def test_boxes_without_rotation_are_suppressed_as_by_torchvision():
    boxes = random_boxes(300, 3)
    boxes[:, 4] = 0
    scores = torch.rand(300, generator=torch.Generator().manual_seed(4))
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)
    for threshold in (0.1, 0.5, 0.9):
        expected = nms(corners, scores, threshold)
        assert torch.equal(nms_rotated(boxes, scores, threshold), expected)
    # Boxes of different classes don't suppress each other.
    kept = batched_nms_rotated(boxes[:1].repeat(2, 1), scores[:2], torch.tensor([0, 1]), 0.1)
    assert sorted(kept.tolist()) == [0, 1]


@pytest.mark.parametrize("ratio", [0, 2])
def test_regions_without_rotation_are_aligned_as_by_torchvision(ratio):
    random = torch.Generator().manual_seed(5)
    features = torch.rand(2, 3, 20, 24, generator=random, dtype=torch.float64)
    boxes = random_boxes(30, 6).double()
    boxes[:, 4] = 0
    images = torch.arange(30).double()[:, None] % 2
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)
    one, other = features.clone().requires_grad_(), features.clone().requires_grad_()
    expected = roi_align(one, torch.cat([images, corners], 1), (4, 5), 0.4, ratio, aligned=True)
    found = roi_align_rotated(other, torch.cat([images, boxes], 1), (4, 5), 0.4, ratio)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(found.shape, generator=random, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(other.grad, one.grad)


def test_a_region_rotated_by_90_degrees_equals_that_of_the_rotated_image():
    features = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(7))
    box = torch.tensor([[0.0, 7, 5, 6, 4, 90]])
    found = roi_align_rotated(features, box, (4, 6), 1.0, 2)
    # Rotating the image clockwise makes the box horizontal and moves (7, 5) to (16 - 5, 7).
    turned = torch.rot90(features, -1, (2, 3))
    level = torch.tensor([[0.0, 16 - 5, 7, 6, 4, 0]])
    torch.testing.assert_close(found, roi_align_rotated(turned, level, (4, 6), 1.0, 2))
    assert not torch.allclose(
        found,
        roi_align_rotated(features, box * torch.tensor([1, 1, 1, 1, 1, -1.0]), (4, 6), 1.0, 2),
    )


def test_no_regions_have_no_features_and_no_gradient():
    features = torch.rand(1, 2, 8, 8, requires_grad=True)
    found = roi_align_rotated(features, torch.zeros(0, 6), (2, 3), 1.0, 0)
    assert found.shape == (0, 2, 2, 3)
    found.sum().backward()
    assert features.grad.abs().sum() == 0
