"""Tests for early stopping and for a classifier's validation loss."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage

from senet_transfer import UserError
from senet_transfer.engine import hooks
from senet_transfer.engine.setup import setup
from senet_transfer.engine.train import main
from senet_transfer.engine.trainer import Trainer
from senet_transfer.evaluation.classification_evaluator import ClassificationEvaluator
from tests.processes import call

# With a learning rate of 0, only the first evaluation is an improvement.
CONSTANT = {
    "SOLVER.BASE_LR": "0.0",
    "SOLVER.MAX_ITER": "20",
    "SOLVER.CHECKPOINT_PERIOD": "1",
    "TEST.EVAL_PERIOD": "1",
    "TEST.PATIENCE": "2",
}


@pytest.mark.parametrize(
    ("metric", "values", "stop"),
    [
        ("classification/top1_error", [5, 4, 4.5, 4.2, 3], 4),
        ("classification/top1_error", [5, 4, 4.5, 3.9, 4.1, 3.9, 2], 6),
        ("bbox/AP", [5, 4, 6, 5, float("nan"), 7], 5),
        ("bbox/AP", [float("nan"), float("nan"), 7], 2),
        ("bbox/AP", [1, 2, 3, 4, 5], None),
        ("validation/loss_cls", [1, 2, 3, 4, 5], 3),
    ],
)
def test_training_ends_after_two_evaluations_without_improvement(metric, values, stop):
    hook = hooks.EarlyStopping(period=10, metric=metric, patience=2)
    trainer = SimpleNamespace(iter=0, max_iter=1000)
    hook.trainer = trainer
    with EventStorage() as trainer.storage:
        for evaluation, value in enumerate(values, 1):
            trainer.iter = 10 * evaluation - 2
            hook.after_step()  # no evaluation in this step
            trainer.iter += 1
            trainer.storage.put_scalar(metric, value)
            hook.after_step()
            if hook.stops:
                break
    assert evaluation == (stop or len(values))
    assert trainer.max_iter == (1000 if stop is None else 10 * stop)


@pytest.mark.long
def test_a_run_that_stops_early_is_complete(command, tmp_path, monkeypatch):
    evaluated = []
    test = Trainer.test.__func__

    def count(cls, *arguments):
        evaluated.append(1)
        return test(cls, *arguments)

    monkeypatch.setattr(Trainer, "test", classmethod(count))
    run = tmp_path / "run"
    main(command(**CONSTANT, **{"TEST.LOSS": "True"}))
    assert len(evaluated) == 3
    results = json.loads((run / "results.json").read_text())
    assert results["training"]["iterations"] == 3
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 2
    assert (run / "last_checkpoint").read_text().strip() == "model_final.pth"
    saved = torch.load(run / "model_best.pth", weights_only=True)
    assert saved["iteration"] == 0
    assert saved["value"] == results["classification"]["top1_error"]
    losses = [
        row["validation/total_loss"]
        for row in map(json.loads, (run / "metrics.json").read_text().splitlines())
        if "validation/total_loss" in row
    ]
    assert losses[-1] == pytest.approx(results["validation"]["total_loss"], rel=1e-6)

    # When a run that stopped early is resumed, it stops again unless the patience is increased.
    main(command("--resume", **CONSTANT))
    assert (run / "log.txt").read_text().count("Early stopping: ") == 2
    assert (
        json.loads((run / "results.json").read_text())["classification"]
        == (results["classification"])
    )
    main(command("--resume", **{**CONSTANT, "TEST.PATIENCE": "4"}))
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 4


@pytest.mark.long
def test_an_interrupted_run_ends_at_the_same_step(command, tmp_path):
    run = tmp_path / "run"
    main(command(**CONSTANT))
    Path(run, "last_checkpoint").write_text("model_0000001.pth")
    main(command("--resume", **CONSTANT))
    # The next evaluation is the second one without an improvement.
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 2


@pytest.mark.slow
def test_two_processes_end_together(words, tmp_path):
    line = words("--num-gpus", "2", "--dist-url", "auto", **CONSTANT)
    result = call(sys.executable, "tools/train_net.py", *line)
    assert result.returncode == 0, result.stderr
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"TEST.PATIENCE": "3", "TEST.EVAL_PERIOD": "0"}, "TEST.PATIENCE is 3, which requires"),
        (
            {"TEST.PATIENCE": "3", "TEST.EVAL_PERIOD": "1", "TEST.BEST_METRIC": ""},
            "TEST.BEST_METRIC is empty",
        ),
        ({"TEST.PATIENCE": "-1"}, "TEST.PATIENCE is -1; expected 0 or more"),
        ({"TEST.BEST_METRIC": "bbox/AP"}, "'bbox/AP', which.*such as: classification/top1_error"),
        ({"TEST.BEST_METRIC": "top1_error"}, "'top1_error', which the evaluation doesn't return"),
        ({"TEST.BEST_METRIC": "validation/total_loss"}, "which the evaluation doesn't return"),
    ],
)
def test_a_metric_that_cannot_exist_is_rejected_at_start(command, overrides, message):
    with pytest.raises(UserError, match=message):
        setup(command(**overrides))


def test_with_several_data_sets_metrics_have_their_names(command, tree, shards):
    sets = {"DATASETS.TEST": f"('{tree}', '{shards}')"}
    message = f"2 datasets in DATASETS.TEST, metric names start .*{tree}/classification/top1_error"
    with pytest.raises(UserError, match=message):
        setup(command(**sets))
    for name in (f"{shards}/classification/top5_error", f"{tree}/validation/total_loss"):
        setup(command(**sets, **{"TEST.BEST_METRIC": name, "TEST.LOSS": "True"}))


def test_the_validation_loss_is_the_mean_cross_entropy():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(10, 4), torch.arange(10) % 4
    evaluator = ClassificationEvaluator(4, 10, with_loss=True)
    for part in (slice(0, 7), slice(7, 10)):
        evaluator.process({"label": labels[part], "key": list("abcdefghij"[part])}, logits[part])
    expected = torch.nn.CrossEntropyLoss()(logits, labels)
    assert evaluator.evaluate()["validation"]["total_loss"] == pytest.approx(float(expected), 1e-6)
