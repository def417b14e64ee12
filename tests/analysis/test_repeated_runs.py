"""Tests of skipping and resuming runs, and of training with several seeds."""

import json
import math
import subprocess

import pytest
import torch

from senet_transfer import UserError
from senet_transfer.analysis.repeated_runs import (
    finished,
    mean_and_deviation,
    metrics,
    run_once,
    run_seeds,
    seeds_report,
)
from senet_transfer.data.cifar.in_memory import ImageArrays, save_images

CONFIG = "configs/instant/cifar10_se_resnet20.yaml"


@pytest.fixture
def options(tmp_path):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    path = tmp_path / "data.safetensors"
    save_images(ImageArrays(images, torch.arange(8) % 2, ["a", "b"], "drawn"), path, "drawn")
    data = [word for key in ("TRAIN", "TEST") for word in (f"DATASETS.{key}", f"('{path}',)")]
    return [*data, "MODEL.BACKBONE.ARCH", "cifar_resnet8", "SOLVER.CHECKPOINT_PERIOD", "1"]


@pytest.mark.long
def test_a_finished_run_is_kept_a_broken_one_taken_up_and_another_refused(
    options, tmp_path, run_python, monkeypatch
):
    monkeypatch.setattr(
        "senet_transfer.analysis.repeated_runs.subprocess.run",
        lambda command, **_: run_python(*command[1:]),
    )
    output = tmp_path / "run"
    found = run_once(CONFIG, options, output, quiet=True)
    assert found["classification"]["images"] == 8
    assert found["training"]["iterations"] == 2
    assert 0 < found["training"]["seconds_per_iteration"] < 10
    before = (output / "log.txt").read_text()
    assert run_once(CONFIG, options, output, quiet=True) == found
    assert (output / "log.txt").read_text() == before
    # Simulate a first run that was killed after one of its two iterations.
    (output / "results.json").unlink()
    (output / "last_checkpoint").write_text("model_0000000.pth")
    whole = torch.load(output / "model_final.pth", weights_only=True)["model"]
    again = run_once(CONFIG, options, output, quiet=True)
    assert again["classification"] == found["classification"]
    assert "Starting training from iteration 1" in (output / "log.txt").read_text()
    resumed = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    with pytest.raises(UserError, match=r"differs in SOLVER.BASE_LR: SOLVER.BASE_LR was 0.001"):
        run_once(CONFIG, [*options, "SOLVER.BASE_LR", "0.5"], output)


def test_a_folder_of_something_else_is_refused(options, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="no run.json"):
        run_once(CONFIG, options, tmp_path / "run")
    assert finished(tmp_path / "run") is None


def test_a_run_that_fails_says_where_its_log_is(options, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(
        "senet_transfer.analysis.repeated_runs.subprocess.run", lambda *_, **__: failed
    )
    with pytest.raises(UserError, match=r"ended with exit status 2 .*log.txt"):
        run_once(CONFIG, options, tmp_path / "run")


def result(error: float) -> dict:
    return {"classification": {"top1_error": error}, "training": {"iterations": 64}}


def test_seeds_have_a_folder_each_and_are_summed_up(tmp_path, monkeypatch):
    calls = []

    def run(config_file, options, folder, **arguments):
        calls.append((options[-2:], folder.name, arguments))
        return result(6.0 + len(calls))

    monkeypatch.setattr("senet_transfer.analysis.repeated_runs.run_once", run)
    config = "configs/cifar10_se_resnet110.yaml"
    found = run_seeds(config, [3, 5], [], tmp_path, quiet=True)
    assert calls == [
        (["SEED", "3"], "seed3", {"quiet": True}),
        (["SEED", "5"], "seed5", {"quiet": True}),
    ]
    report = seeds_report(config, [], found).splitlines()
    cells = [cell.strip() for cell in report[2].strip("|").split("|")]
    assert cells == ["classification/top1_error", "7.000", "8.000", "7.500", "0.707"]
    assert "SE-ResNet-110: 5.21" in report[-1]
    assert "Table IV" in report[-1]


def test_mean_and_deviation_are_those_of_a_sample():
    summary = mean_and_deviation([result(error) for error in (5.0, 6.0, 10.0)])
    assert summary["classification/top1_error"] == (7.0, pytest.approx(7**0.5))
    assert math.isnan(mean_and_deviation([result(5.0)])["training/iterations"][1])
    assert metrics(json.loads(json.dumps(result(5.0)))) == {
        "classification/top1_error": 5.0,
        "training/iterations": 64.0,
    }
