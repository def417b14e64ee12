"""Tests that faster-coco-eval and pycocotools give the same results in Detectron2's evaluator."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.cocoeval import COCOeval

from senet_transfer.evaluation import coco as coco_metrics
from senet_transfer.evaluation.coco import FastCOCOEvaluator
from senet_transfer.evaluation.exact_metrics import recalls_of_two
from senet_transfer.utils.atomic_io import nonfinite_to_null

SIDE, IMAGES, CLASSES = 160, 40, 5


def box_of(draw: np.random.Generator) -> list[float]:
    corner, size = draw.uniform(0, 80, 2), draw.uniform(2, 80, 2)
    return [float(value) for value in (*corner, *size)]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Register a dataset with crowd annotations, and yield all its annotations.

    Some images and one class have no annotations.
    """
    draw = np.random.default_rng(0)
    annotations = []
    for image in range(IMAGES - 4):
        for _ in range(draw.integers(1, 9)):
            x, y, w, h = box_of(draw)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": int(10 * draw.integers(1, CLASSES)),
                    "bbox": [x, y, w, h],
                    "area": w * h * float(draw.uniform(0.5, 1)),
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    for annotation in annotations[::15]:
        annotation["iscrowd"] = 1
        size, pixels = [SIDE, SIDE], SIDE * SIDE
        annotation["segmentation"] = {"size": size, "counts": [pixels // 3, 400, pixels // 3 * 2]}
        annotation["segmentation"]["counts"][2] = pixels - 400 - pixels // 3
    file = tmp_path_factory.mktemp("coco") / "truth.json"
    sizes = {"height": SIDE, "width": SIDE}
    images = [{"id": i + 1, "file_name": f"{i}.jpg", **sizes} for i in range(IMAGES)]
    names = [{"id": 10 * (index + 1), "name": f"class {index}"} for index in range(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": names, "info": {}}
    file.write_text(json.dumps(content))
    register_coco_instances("metrics_test", {}, str(file), str(file.parent))
    DatasetCatalog.get("metrics_test")
    yield annotations
    DatasetCatalog.remove("metrics_test")
    MetadataCatalog.remove("metrics_test")


def predictions(truth: list[dict], masks: bool) -> list[tuple[dict, dict]]:
    """Return shifted ground-truth objects and random false positives, with tied scores.

    Some images have more than 100 detections.
    """
    draw = np.random.default_rng(1)
    found = []
    for image in range(1, IMAGES + 1):
        own = [row for row in truth if row["image_id"] == image]
        rows = [(np.add(row["bbox"], draw.normal(0, 3, 4)), row["category_id"]) for row in own]
        invented = draw.integers(0, 120 if image % 10 == 0 else 6)
        rows += [(box_of(draw), int(10 * draw.integers(1, CLASSES + 1))) for _ in range(invented)]
        boxes = np.array([row[0] for row in rows]).reshape(-1, 4)
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 1)
        instances = Instances((SIDE, SIDE))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.tensor(draw.integers(1, 12, len(rows)) / 12)
        instances.pred_classes = torch.tensor([row[1] // 10 - 1 for row in rows], dtype=torch.int64)
        if masks:
            grid = torch.arange(SIDE)
            x1, y1, x2, y2 = instances.pred_boxes.tensor[:, :, None].unbind(1)
            columns, lines = (grid >= x1) & (grid < x2), (grid >= y1) & (grid < y2)
            instances.pred_masks = lines[:, :, None] & columns[:, None, :]
        found.append(({"image_id": image}, {"instances": instances}))
    return found


def evaluate(evaluator: COCOEvaluator, found: list[tuple[dict, dict]]) -> dict:
    evaluator.reset()
    for given, output in found:
        evaluator.process([given], [output])
    return evaluator.evaluate()


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.long
def test_every_metric_equals_pycocotools(truth, masks, monkeypatch):
    found = predictions(truth, masks)
    expected = evaluate(COCOEvaluator("metrics_test", use_fast_impl=False), found)
    slow = []
    monkeypatch.setattr(COCOeval, "evaluateImg", lambda *_: slow.append(1))
    result = evaluate(FastCOCOEvaluator("metrics_test"), found)
    assert not slow
    assert list(result) == list(expected) == (["bbox", "segm"] if masks else ["bbox"])
    for task, numbers in expected.items():
        assert list(result[task]) == list(numbers)
        assert len(numbers) == 6 + CLASSES
        for name, value in numbers.items():
            assert result[task][name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert 5 < expected["bbox"]["AP"] < 95


@pytest.mark.long
def test_the_twelve_coco_metrics_equal_pycocotools(truth, monkeypatch):
    """Compare all twelve COCO metrics, because Detectron2 reports only the six AP metrics."""
    stats = []
    derive = COCOEvaluator._derive_coco_results

    def keep(self, coco_eval, *arguments, **options):
        stats.append(np.array(coco_eval.stats[:12]))
        return derive(self, coco_eval, *arguments, **options)

    monkeypatch.setattr(COCOEvaluator, "_derive_coco_results", keep)
    found = predictions(truth, masks=False)
    for evaluator in (COCOEvaluator("metrics_test", use_fast_impl=False), FastCOCOEvaluator):
        kind = evaluator if isinstance(evaluator, COCOEvaluator) else evaluator("metrics_test")
        evaluate(kind, found)
    assert stats[0].shape == (12,)
    np.testing.assert_allclose(stats[1], stats[0], rtol=0, atol=1e-9)


def test_without_faster_coco_eval_pycocotools_is_used(truth, monkeypatch):
    found = predictions(truth, masks=False)
    fast = evaluate(FastCOCOEvaluator("metrics_test"), found)
    monkeypatch.setattr(coco_metrics, "faster_coco_eval", None)
    slow = evaluate(FastCOCOEvaluator("metrics_test"), found)
    assert slow["bbox"] == pytest.approx(fast["bbox"], abs=1e-9, nan_ok=True)


def test_no_detections_are_reported_as_pycocotools_reports_them(truth):
    empty = [(given, {"instances": output["instances"][:0]}) for given, output in
             predictions(truth, masks=False)]  # fmt: skip
    expected = evaluate(COCOEvaluator("metrics_test", use_fast_impl=False), empty)
    assert str(evaluate(FastCOCOEvaluator("metrics_test"), empty)) == str(expected)


@pytest.mark.long
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_an_evaluation_writes_the_diagnostics_of_its_predictions(truth, masks, tmp_path):
    kinds = ("bbox", "segm")
    evaluator = FastCOCOEvaluator("metrics_test", output_dir=str(tmp_path), diagnostics=kinds)
    results = evaluate(evaluator, predictions(truth, masks))
    assert list(evaluator.diagnostics) == list(results)
    for task, numbers in results.items():
        found = evaluator.diagnostics[task]
        for name in ("AP", "AP50", "AP75"):
            assert found[name] == pytest.approx(numbers[name], abs=1e-9)
        sizes = [row["AP"] for row in found["by_size"]]
        expected = [numbers[name] for name in ("APs", "APm", "APl")]
        assert sizes == pytest.approx(expected, abs=1e-9, nan_ok=True)
        for row in found["classes"]:
            assert row["AP"] == pytest.approx(numbers[f"AP-{row['name']}"], abs=1e-9, nan_ok=True)
    written = json.loads((tmp_path / "diagnostics.json").read_text())
    assert written == nonfinite_to_null(evaluator.diagnostics)
    # An evaluation that computes no diagnostics deletes those of an earlier one.
    evaluate(FastCOCOEvaluator("metrics_test", output_dir=str(tmp_path)), [])
    assert not (tmp_path / "diagnostics.json").exists()


def test_two_objects_reach_the_recall_that_one_does_not():
    counts = np.arange(2, 300_000)
    recalls = recalls_of_two(counts)
    assert (recalls > 1 / counts).all()
    assert (recalls <= 2 / counts).all()
    assert len(np.unique(recalls)) < 20
    assert recalls_of_two(np.array([0, 1])).tolist() == [2, 2]
