"""Tests for evaluation with more objects per image than COCO's limit of 100 detections."""

import contextlib
import io
import json

import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer


@pytest.fixture
def dense(shared_data, command):
    """Return an evaluation function and the path of the annotation file.

    The function sets ``TEST.DETECTIONS_PER_IMAGE`` to its argument, evaluates detections that are
    equal to the ground truth, and returns the bounding-box metrics.
    """
    folder = shared_data.parent / "cases" / "detection" / "dense"

    def evaluate(limit: str, *, output_dir) -> dict:
        options = command(
            "--dataset", "dense", str(folder / "val.json"), str(folder / "images"),
            **{
                "DATASETS.TRAIN": "('dense',)",
                "DATASETS.TEST": "('dense',)",
                "TEST.DETECTIONS_PER_IMAGE": limit,
                "OUTPUT_DIR": str(output_dir),
            },
        )  # fmt: skip
        cfg = setup(options)
        truth = json.loads((folder / "val.json").read_text())
        boxes = torch.tensor([item["bbox"] for item in truth["annotations"]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((truth["images"][0]["height"], truth["images"][0]["width"]))
        found.pred_boxes = Boxes(boxes)
        found.scores = torch.linspace(0.9, 0.5, len(boxes))
        found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
        evaluator = Trainer.build_evaluator(cfg, "dense")
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [{"instances": found[: int(limit)]}])
        return evaluator.evaluate()["bbox"]

    return evaluate, folder / "val.json"


@pytest.mark.long
def test_perfect_detections_of_256_objects_score_100_where_the_limit_allows(dense, tmp_path):
    evaluate, file = dense
    assert len(json.loads(file.read_text())["annotations"]) == 256
    assert evaluate("500", output_dir=tmp_path)["AP"] == pytest.approx(100)
    assert "at most 500 are detected" not in (tmp_path / "log.txt").read_text()


@pytest.mark.long
def test_the_default_limit_equals_pycocotools_with_a_warning(dense, tmp_path):
    evaluate, file = dense
    found = evaluate("100", output_dir=tmp_path)["AP"]
    warning = "up to 256 objects per image, but at most 100 are detected"
    assert warning in (tmp_path / "log.txt").read_text()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        results = tmp_path / "inference" / "dense" / "coco_instances_results.json"
        judge = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert found == 100 * judge.stats[0]
    assert 35 < found < 45


def test_a_low_limit_does_not_change_the_metrics(dense, tmp_path):
    evaluate, _ = dense
    # With a limit of 10 detections, at most 10 of 256 objects are found.
    assert evaluate("10", output_dir=tmp_path)["AP"] == pytest.approx(100 * 4 / 101)
