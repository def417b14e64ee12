"""Tests for the SENet paper's detection config on COCO128, at a low resolution for a CPU."""

import contextlib
import io
import json

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer

REDUCED = [
    *("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "GN"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", "160"),
    *("INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "160"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0025", "SOLVER.STEPS", "()"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RPN.POST_NMS_TOPK_TEST", "30"),
    *("DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
]


@pytest.mark.slow
def test_the_papers_config_trains_resumes_and_evaluates_on_coco_images(shared_data, tmp_path):
    coco = shared_data / "coco128"
    json_file = coco / "annotations" / "instances_train2017.json"

    def start(*flags, **overrides):
        words = ["--config-file", "configs/faster_rcnn_se_r50.yaml", *flags]
        words += ["--dataset", "coco128", str(json_file), str(coco / "train2017")]
        words += [*REDUCED, "OUTPUT_DIR", str(tmp_path)]
        words += ["DATASETS.TRAIN", "('coco128',)", "DATASETS.TEST", "('coco128',)"]
        args = run_options(
            argument_parser().parse_args(words + [w for pair in overrides.items() for w in pair])
        )
        return args, setup(args)

    _, cfg = start(**{"SOLVER.MAX_ITER": "2"})
    assert len(cfg.DATASETS.CLASSES) == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    first = Trainer(cfg)
    first.resume_or_load(resume=False)
    super(Trainer, first).train()
    _, cfg = start("--resume", **{"SOLVER.MAX_ITER": "4"})
    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    second.train()
    trained = second.results["bbox"]

    final = str(tmp_path / "model_final.pth")
    _, cfg = start("--eval-only", **{"MODEL.WEIGHTS": final})
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(final)
    evaluated = Trainer.evaluate(cfg, model)["bbox"]
    assert evaluated == pytest.approx(trained, nan_ok=True)

    written = tmp_path / "inference" / "coco128" / "coco_instances_results.json"
    assert json.loads(written.read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        scores = COCOeval(truth, truth.loadRes(str(written)), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    for key, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), scores.stats, strict=False):
        assert evaluated[key] == 100 * value
