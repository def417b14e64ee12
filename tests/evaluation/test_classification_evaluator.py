"""Tests for the classification evaluator."""

import json
import os

import pytest
import torch

from senet_transfer import UserError
from senet_transfer.evaluation.classification_evaluator import ClassificationEvaluator


def evaluated(logits, labels, expected=None, batch=7, **options):
    evaluator = ClassificationEvaluator(
        logits.shape[1], len(labels) if expected is None else expected, **options
    )
    for first in range(0, len(labels), batch):
        part = slice(first, first + batch)
        places = list(range(len(labels)))[part]
        inputs = {"label": labels[part], "key": [str(place) for place in places], "index": places}
        evaluator.process(inputs, logits[part])
    return evaluator, evaluator.evaluate()


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_errors_equal_a_simple_count(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=generator)
    labels = torch.randint(classes, (50,), generator=generator)
    evaluator, results = evaluated(logits, labels)
    order = [sorted(range(classes), key=lambda c: -row[c].item()) for row in logits]
    hits = [[row.index(label)] for row, label in zip(order, labels.tolist(), strict=True)]
    assert results == {
        "classification": {
            "top1_error": 100 * sum(place > 0 for (place,) in hits) / 50,
            "top5_error": 100 * sum(place > 4 for (place,) in hits) / 50,
            "images": 50,
        }
    }
    assert int(evaluator.confusion.sum()) == 50
    assert int(evaluator.confusion[1].sum()) == int((labels == 1).sum())


def test_predictions_are_kept_in_order_with_logits():
    logits = torch.randn(9, 6)
    evaluator, _ = evaluated(logits, torch.zeros(9, dtype=torch.int64), keep_logits=True)
    assert [row["key"] for row in evaluator.predictions] == [str(index) for index in range(9)]
    assert torch.tensor([row["logits"] for row in evaluator.predictions]).equal(logits)
    assert evaluator.predictions[3]["top"] == logits[3].topk(5).indices.tolist()


def test_predictions_are_written_in_the_order_of_the_data(tmp_path):
    logits, labels = torch.randn(6, 3), torch.tensor([2, 1, 0, 0, 1, 2])
    evaluator = ClassificationEvaluator(3, 6, output_dir=str(tmp_path / "val"))
    for part in ([3, 4, 5], [0, 1, 2]):  # the order in which two workers deliver them
        keys = [f"image{place}" for place in part]
        evaluator.process({"label": labels[part], "key": keys, "index": part}, logits[part])
    evaluator.evaluate()
    assert [row["key"] for row in evaluator.predictions] == [f"image{k}" for k in range(6)]
    path = tmp_path / "val" / "predictions.json"
    with open(path) as opened:
        evaluator.evaluate()
        # A program that reads the file during the next evaluation still gets the complete old file.
        assert os.stat(opened.fileno()).st_nlink == 0
        written = json.load(opened)
    assert written == json.loads(path.read_text())
    assert written["index"] == [0, 1, 2, 3, 4, 5]
    assert written["label"] == labels.tolist()
    assert written["top"] == logits.argsort(1, descending=True).tolist()
    expected = logits.exp().amax(1) / logits.exp().sum(1)
    assert written["probability"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_second_evaluation_starts_from_scratch():
    evaluator, first = evaluated(torch.randn(9, 6), torch.zeros(9, dtype=torch.int64))
    evaluator.reset()
    evaluator.process({"label": torch.tensor([1]), "key": ["a"]}, torch.eye(6)[1:2])
    evaluator.expected = 1
    assert evaluator.evaluate()["classification"]["top1_error"] == 0


@pytest.mark.parametrize("expected", [8, 10])
def test_images_outside_the_data_set_are_an_error(expected):
    with pytest.raises(UserError, match=f"9 images were evaluated; expected {expected}"):
        evaluated(torch.randn(9, 6), torch.zeros(9, dtype=torch.int64), expected)


def test_non_finite_logits_and_other_classes_are_rejected():
    logits = torch.randn(9, 6)
    logits[8, 2] = torch.nan
    with pytest.raises(UserError, match="not finite; the first image is 8"):
        evaluated(logits, torch.zeros(9, dtype=torch.int64))
    evaluator = ClassificationEvaluator(5, 9)
    with pytest.raises(UserError, match="has 6 classes, but the data has 5"):
        evaluator.process({"label": torch.zeros(1), "key": ["a"]}, torch.randn(1, 6))
