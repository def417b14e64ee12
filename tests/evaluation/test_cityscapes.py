"""Tests for the Cityscapes evaluators, which need the package cityscapesscripts."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.structures import Boxes, Instances
from PIL import Image

from senet_transfer.evaluation.evaluators import other_evaluator

labels = pytest.importorskip("cityscapesscripts.helpers.labels")
pytestmark = pytest.mark.long

ROAD, SKY, CAR, PERSON = 7, 23, 26, 24
STEM = "aachen_000000_000019"


@pytest.fixture
def city(tmp_path, monkeypatch):
    """Write the annotations of one image in the folder layout of Cityscapes.

    Yield the image's label ids, instance ids, and a dict with the ``file_name``.
    """
    ids = np.full((64, 128), ROAD, np.uint8)
    ids[:20] = SKY
    ids[30:50, 20:60] = CAR
    ids[30:50, 70:90] = PERSON
    instances = ids.astype(np.uint16)
    instances[(ids == CAR) | (ids == PERSON)] *= 1000
    folder = tmp_path / "gtFine" / "aachen"
    folder.mkdir(parents=True)
    Image.fromarray(ids).save(folder / f"{STEM}_gtFine_labelIds.png")
    Image.fromarray(instances).save(folder / f"{STEM}_gtFine_instanceIds.png")
    metadata = _get_builtin_metadata("cityscapes")
    MetadataCatalog.get("city").set(gt_dir=str(folder.parent), **metadata)
    monkeypatch.chdir(tmp_path)
    yield ids, instances, {"file_name": f"{STEM}_leftImg8bit.png"}
    MetadataCatalog.remove("city")


def test_the_iou_of_cityscapes_segmentations_equals_a_count_by_hand(city, tmp_path):
    ids, _, record = city
    train_ids = np.vectorize(lambda value: labels.id2label[value].trainId)(ids)
    predicted = train_ids.copy()
    predicted[:, :16] = 0  # road
    ious = []
    for label in np.unique(train_ids):
        one, other = predicted == label, train_ids == label
        ious.append((one & other).sum() / (one | other).sum())
    scores = torch.nn.functional.one_hot(torch.tensor(predicted).long(), 19).permute(2, 0, 1)
    evaluator = other_evaluator("cityscapes_sem_seg", "city", str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process([record], [{"sem_seg": scores.float()}])
    assert evaluator.evaluate()["sem_seg"]["IoU"] == pytest.approx(100 * np.mean(ious))


def test_correct_and_missing_instances_of_cityscapes_have_an_ap_of_100_and_0(city, tmp_path):
    _, instances, record = city
    things = MetadataCatalog.get("city").thing_classes
    for found, expected in (([CAR, PERSON], 100), ([CAR], 50)):
        predicted = Instances((64, 128), pred_boxes=Boxes(torch.zeros(len(found), 4)))
        predicted.pred_masks = torch.tensor(np.array([instances == 1000 * v for v in found]))
        predicted.scores = torch.ones(len(found))
        names = [labels.id2label[value].name for value in found]
        predicted.pred_classes = torch.tensor([things.index(name) for name in names])
        evaluator = other_evaluator("cityscapes_instance", "city", str(tmp_path / "out"))
        evaluator.reset()
        evaluator.process([record], [{"instances": predicted}])
        assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(expected)
    assert not (tmp_path / "matches.json").exists()
