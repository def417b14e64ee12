"""Tests for training runs: output files, exact resumption and multiple processes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from senet_transfer import UserError, load_weights
from senet_transfer.engine import hooks
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from senet_transfer.models import ImageClassifier
from tests.comparing import assert_same
from tests.engine.classification.conftest import BATCH_NORM

# Options that enable every feature that draws random numbers or has state.
EVERYTHING = {
    "MODEL.CLASSIFIER.DROPOUT": "0.3",
    "MODEL.CLASSIFIER.MIXUP": "0.2",
    "MODEL.CLASSIFIER.CUTMIX": "1.0",
    **BATCH_NORM,
    # Training is stable even at ten times this learning rate.
    "SOLVER.BASE_LR": "0.0001",
    "SOLVER.EMA.ENABLED": "True",
    "SOLVER.MICRO_BATCHES": "2",
    "SOLVER.LR_SCHEDULER_NAME": "WarmupPlateauLR",
    "SOLVER.PLATEAU.PATIENCE": "0",
    "SOLVER.FROZEN_BN_ITERS": "2",
    "TEST.EVAL_PERIOD": "2",
}


def saved(run: Path, name: str = "model_final.pth") -> dict:
    return torch.load(run / name, weights_only=True)


@pytest.mark.parametrize(("source", "workers"), [("tree", 0), ("shards", 0), ("shards", 1)])
@pytest.mark.long
def test_a_run_interrupted_mid_epoch_resumes_bitwise_equal(
    train, request, tmp_path, source, workers
):
    data = f"('{request.getfixturevalue(source)}',)"
    keys = {"DATASETS.TRAIN": data, "DATASETS.TEST": data, "DATALOADER.NUM_WORKERS": str(workers)}
    keys |= {"SOLVER.MAX_ITER": "8", "SOLVER.CHECKPOINT_PERIOD": "4", **EVERYTHING}
    straight = tmp_path / "straight"
    trainer = train(**keys, OUTPUT_DIR=str(straight))
    assert trainer.scheduler.drops > 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("model_0000003.pth", "config.yaml"):
        shutil.copy(straight / name, broken / name)
    (broken / "last_checkpoint").write_text("model_0000003.pth")
    resumed = train("--resume", **keys, OUTPUT_DIR=str(broken))
    assert resumed.start_iter == 4
    # With 24 images and 4 per step, both halves of the run end in the middle of an epoch.
    for name in ("model_final.pth", "model_ema.pth"):
        found, expected = saved(broken, name), saved(straight, name)
        assert found.pop("senet_transfer") == expected.pop("senet_transfer")
        assert {"model", "iteration"} <= found.keys()
        assert_same(found, expected)


@pytest.mark.long
def test_the_ema_equals_a_simple_recursion_and_is_evaluated(command, monkeypatch):
    keys = {"SOLVER.EMA.ENABLED": "True", "SOLVER.EMA.DECAY": "0.5", "SOLVER.MAX_ITER": "3"}
    trainer = Trainer(setup(command(**keys, **{"TEST.EVAL_PERIOD": "1"})))
    states, evaluated = [], []

    def state():
        return {key: value.clone() for key, value in trainer.model.state_dict().items()}

    def evaluate(cfg, model):
        evaluated.append(state())
        return {}

    monkeypatch.setattr(trainer, "test", evaluate)
    monkeypatch.setattr(trainer._hooks[-1], "after_step", lambda: states.append(state()))
    start = state()
    trainer.train()
    average = start
    for step, (weights, seen) in enumerate(zip(states, evaluated, strict=True), start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {k: decay * average[k] + (1 - decay) * weights[k] for k in average}
        for key, value in average.items():
            torch.testing.assert_close(seen[key], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(states[-1]["linear.weight"], evaluated[-1]["linear.weight"])


@pytest.mark.long
def test_batch_norm_statistics_are_frozen_in_the_last_iterations(command, monkeypatch):
    keys = {**BATCH_NORM, "SOLVER.FROZEN_BN_ITERS": "2", "SOLVER.MAX_ITER": "4"}
    trainer = Trainer(setup(command(**keys, **{"TEST.EVAL_PERIOD": "1"})))
    seen = []
    norm = trainer.model.backbone.res3[0].conv1.norm
    note = lambda: seen.append((norm.running_mean.clone(), norm.weight.detach().clone()))  # noqa: E731
    monkeypatch.setattr(trainer._hooks[-1], "after_step", note)
    trainer.train()
    means, weights = zip(*seen, strict=True)
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3])
    assert not torch.equal(weights[2], weights[3])


@pytest.mark.long
def test_the_best_model_survives_resuming_and_is_never_tagged_as_last(train, command, tmp_path):
    run = tmp_path / "run"
    keys = {"SOLVER.MAX_ITER": "4", "TEST.EVAL_PERIOD": "2"}
    train(**keys)
    assert (run / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(run.glob(".*incoming*"))
    best = saved(run, "model_best.pth")
    assert best["metric"] == "classification/top1_error"
    assert "trainer" not in best
    # Pretend that the best model of the first half is better than any later model.
    best["value"] = -1.0
    torch.save(best, run / "model_best.pth")
    (run / "model_best.pth.sha256").unlink()
    resumed = train("--resume", **{**keys, "SOLVER.MAX_ITER": "6"})
    assert resumed.start_iter == 4
    assert saved(run, "model_best.pth")["value"] == -1.0
    # A new run in the same folder ignores the previous best model.
    train("--overwrite", **keys)
    assert saved(run, "model_best.pth")["value"] >= 0


@pytest.mark.long
def test_the_best_model_has_the_lowest_error(command, tmp_path, monkeypatch):
    trainer = Trainer(setup(command(**{"SOLVER.MAX_ITER": "5", "TEST.EVAL_PERIOD": "1"})))
    errors = iter([50.0, 30.0, 40.0, math.nan, 35.0])
    monkeypatch.setattr(
        trainer, "test", lambda *_: {"classification": {"top1_error": next(errors)}}
    )
    trainer.train()
    best = saved(tmp_path / "run", "model_best.pth")
    assert (best["value"], best["iteration"]) == (30.0, 1)
    model = trainer.build_model(trainer.cfg)
    report = load_weights(model, tmp_path / "run" / "model_best.pth")
    assert not report.initialised


@pytest.mark.long
def test_a_run_stores_its_training_data_and_evaluates_with_it(train, tree, tmp_path, run_python):
    train()
    config = str(tmp_path / "run" / "config.yaml")
    text = Path(config).read_text()
    for name in ("blue", "nested/blue", str(tree), "NUM_CLASSES: 4"):
        assert name in text
    results = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert results["classification/images"] == 24
    first = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[0])
    assert first["elapsed_seconds"] > 0
    assert first["peak_memory_mb"] > 100
    place = tmp_path / "run" / "inference" / tree.name / "predictions.json"
    predictions = json.loads(place.read_text())
    assert predictions["index"] == list(range(24))
    assert predictions["label"] == sorted(predictions["label"])
    flags = ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    wrong = [["classification", "top1_error", 200.0, 1.0]]
    flags += ["TEST.EXPECTED_RESULTS", str(wrong)]
    done = run_python("tools/train_net.py", "--config-file", config, *flags)
    assert done.returncode == 1
    assert "Result verification failed" in done.stdout + done.stderr
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    for key, value in again["classification"].items():
        assert results[f"classification/{key}"] == value


@pytest.mark.long
def test_a_classifier_of_other_classes_is_replaced_and_logged(train, tree, tmp_path, caplog):
    train()
    smaller = tmp_path / "smaller"
    for name in ("blue", "red"):
        shutil.copytree(tree / name, smaller / name)
    data = f"('{smaller}',)"
    keys = {"DATASETS.TRAIN": data, "DATASETS.TEST": data, "OUTPUT_DIR": str(tmp_path / "second")}
    weights = {"MODEL.WEIGHTS": str(tmp_path / "run" / "model_final.pth")}
    trainer = train(**keys, **weights, **{"SOLVER.BASE_LR": "0.0"})
    assert trainer.model.linear.out_features == 2
    initialised = trainer.checkpointer.report.initialised
    assert set(initialised) == {"linear.weight", "linear.bias"}
    first = saved(tmp_path / "run")["model"]
    torch.testing.assert_close(
        trainer.model.backbone.res5[0].conv1.weight.detach(),
        first["backbone.res5.0.conv1.weight"],
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(
    ("flags", "overrides", "message"),
    [
        ((), {"DATASETS.TRAIN": "('no/such',)"}, "Dataset no/such not found.*DETECTRON2_DATASETS"),
        ((), {"DATASETS.TRAIN": "()"}, "expected exactly one: a folder of shards"),
        ((), {"DATASETS.REGISTER": "[['a', 'b', 'c']]"}, "set DATASETS.TRAIN to the path"),
        (
            (),
            {"DATASETS.CLASSES": "['a', 'b']"},
            "not among the 2 expected classes.*DATASETS.CLASSES",
        ),
        ((), {"SOLVER.MICRO_BATCHES": "3"}, "MICRO_BATCHES is 3"),
        ((), {"SOLVER.LR_SCHEDULER_NAME": "WarmupPlateauLR"}, "EVAL_PERIOD"),
        ((), {"DATALOADER.SAMPLER_TRAIN": "RandomSubset"}, "ClassAwareSampler"),
        (("--eval-only",), {}, "random weights"),
    ],
)
def test_an_invalid_classification_run_is_rejected(command, flags, overrides, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        Trainer(setup(command(*flags, **overrides)))


@pytest.mark.long
def test_a_resumed_run_logs_changed_keys_and_keys_without_effect(train, command, tmp_path):
    train()
    log, words = tmp_path / "run" / "log.txt", "The config has changed"
    same = setup(command("--resume"))
    assert words not in log.read_text()
    other = {"SOLVER.BASE_LR": "0.3", "SOLVER.MAX_ITER": "6"}
    trainer = Trainer(setup(command("--resume", **other)))
    _, _, said = log.read_text().partition(words)
    rows = [line.split() for line in said.splitlines()[:5] if line.startswith("SOLVER.")]
    assert sorted(rows) == [
        ["SOLVER.BASE_LR", "0.0005", "0.3", "none"],
        ["SOLVER.MAX_ITER", "2", "6", "from", "here", "on"],
    ]
    trainer.resume_or_load(resume=True)
    assert {g["initial_lr"] for g in trainer.optimizer.param_groups} == {same.SOLVER.BASE_LR}
    setup(command("--resume"))  # the saved config is valid for resuming again
    with pytest.raises(UserError, match="OPTIMIZER is AdamW, but the run to resume used.* SGD"):
        setup(command("--resume", **{"SOLVER.OPTIMIZER": "AdamW"}))
    other = Trainer(setup(command("--resume", **{"SOLVER.WEIGHT_DECAY_BIAS": "0.0"})))
    with pytest.raises(UserError, match="does not match this run's optimizer"):
        other.resume_or_load(resume=True)


@pytest.mark.long
def test_a_run_from_weights_of_another_view_keeps_its_own_view(train, tmp_path):
    first = train()
    assert first.model.preprocessing.crop == 32
    keys = {"INPUT.CLASSIFICATION.TEST_CROP": "24", "INPUT.CLASSIFICATION.TEST_RESIZE": "27"}
    weights = {"MODEL.WEIGHTS": str(tmp_path / "run" / "model_final.pth")}
    train(**keys, **weights, OUTPUT_DIR=str(tmp_path / "second"))
    stated = saved(tmp_path / "second")["senet_transfer"]["preprocessing"]
    assert (stated["resize"], stated["crop"]) == (27, 24)


def test_data_is_found_below_the_root_of_all_data(command, tree, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tree.parent))
    cfg = setup(command(**{"DATASETS.TRAIN": f"('{tree.name}',)"}))
    assert (str(tree),) == cfg.DATASETS.TRAIN
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 4
    assert cfg.DATASETS.CLASSES == ["blue", "green", "nested/blue", "red"]


@pytest.mark.long
def test_class_aware_sampling_and_epochs_train(train, tmp_path):
    keys = {"DATALOADER.SAMPLER_TRAIN": "ClassAwareSampler", "SOLVER.EPOCHS": "0.5"}
    keys |= {"SOLVER.MAX_ITER": "40000", "SOLVER.STEPS": "(30000,)"}
    trainer = train(**keys)
    assert trainer.max_iter == 3
    assert isinstance(trainer.model, ImageClassifier)
    assert saved(tmp_path / "run")["iteration"] == 2


def test_each_step_is_seeded_by_itself():
    class Run:
        iter = 0

    hook, drawn = hooks.StepSeed(7), []
    hook.trainer = Run()
    for hook.trainer.iter in (0, 1, 0):
        hook.before_step()
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
@pytest.mark.long
def test_two_processes_and_one_have_the_same_loss_and_errors(
    words, train, tmp_path, run_python, norm
):
    start = tmp_path / "start"
    keys = BATCH_NORM if norm == "FrozenBN" else {}
    trainer = train(OUTPUT_DIR=str(start), **keys)
    assert trainer.iter == 2
    # Each step uses all images, so both runs see the same images in every step.
    keys = {
        **keys,
        "MODEL.RESNETS.NORM": norm,
        "MODEL.WEIGHTS": str(start / "model_final.pth"),
        "SOLVER.IMS_PER_BATCH": "24",
        "SOLVER.MAX_ITER": "3",
    }
    found = []
    for processes in ("1", "2"):
        run = tmp_path / processes
        line = words("--num-gpus", processes, "--dist-url", "auto", OUTPUT_DIR=str(run), **keys)
        done = run_python("tools/train_net.py", *line)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(row) for row in (run / "metrics.json").read_text().splitlines()]
        found.append({key: value for row in rows for key, value in row.items()})
    one, two = found
    assert one["classification/images"] == two["classification/images"] == 24
    assert one["classification/top1_error"] == two["classification/top1_error"]
    assert one["classification/top5_error"] == two["classification/top5_error"]
    assert two["total_loss"] == pytest.approx(one["total_loss"], abs=1e-4)


def test_a_classifier_is_not_evaluated_on_other_classes(command, tmp_path):
    model = Trainer.build_model(setup(command()))
    Checkpointer(model, str(tmp_path), classes=("a", "b", "c", "d")).save("other")
    with pytest.raises(
        UserError, match=r"(?s)classes that differ.*'a', 'b', 'c', 'd'.*'blue', 'green'"
    ):
        setup(command("--eval-only", **{"MODEL.WEIGHTS": str(tmp_path / "other.pth")}))
