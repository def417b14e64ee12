"""Tests for skipping and resuming runs, and for training with several seeds."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog

from senet_transfer import UserError
from senet_transfer.analysis.repeated_runs import (
    Run,
    _start,
    finished,
    fold_options,
    mean_and_deviation,
    metrics,
    run_all,
    runs_report,
    seed_runs,
)
from senet_transfer.cli.analysis.sweep import command as sweep
from senet_transfer.cli.data import prepare
from senet_transfer.config.load import load_config
from senet_transfer.data.cifar.in_memory import ImageArrays, save_images
from senet_transfer.data.detection.coco import register_datasets
from senet_transfer.data.split_files import split_data
from senet_transfer.data.splits import Split
from senet_transfer.utils import folder_lock

CONFIG = "configs/instant/cifar10_se_resnet20.yaml"


@pytest.fixture
def options(tmp_path):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    path = tmp_path / "data.safetensors"
    save_images(ImageArrays(images, torch.arange(8) % 2, ["a", "b"], "drawn"), path, "drawn")
    data = [word for key in ("TRAIN", "TEST") for word in (f"DATASETS.{key}", f"('{path}',)")]
    return [*data, "MODEL.BACKBONE.ARCH", "cifar_resnet8", "SOLVER.CHECKPOINT_PERIOD", "1"]


@pytest.fixture
def trains(run_python, monkeypatch):
    """Start training runs with ``run_python``, which is faster than a new Python process."""

    def start(command, **_):
        status = run_python(*command[1:]).returncode
        return SimpleNamespace(poll=lambda: status)

    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._start", start)


def run_once(config, options, output, **arguments):
    return run_all([Run(config, tuple(options), output)], **arguments)[0]


@pytest.mark.long
@pytest.mark.usefixtures("trains")
def test_finished_runs_are_kept_interrupted_ones_resumed_others_rejected(options, tmp_path):
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
    with pytest.raises(UserError, match=r"differ in SOLVER.BASE_LR: SOLVER.BASE_LR was 0.001"):
        run_once(CONFIG, [*options, "SOLVER.BASE_LR", "0.5"], output)
    # A key that the record of an earlier version lacks counts as having its default value.
    begun = json.loads((output / "run.json").read_text())
    del begun["SOLVER.MICRO_BATCHES"]
    (output / "run.json").write_text(json.dumps(begun))
    assert run_once(CONFIG, options, output)["classification"] == found["classification"]
    with pytest.raises(UserError, match=r"MICRO_BATCHES was 1 and is now 2"):
        run_once(CONFIG, [*options, "SOLVER.MICRO_BATCHES", "2"], output)


def test_a_folder_with_other_content_is_rejected(options, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="no run.json"):
        run_once(CONFIG, options, tmp_path / "run")
    assert finished(tmp_path / "run") is None


def test_a_failed_run_reports_where_its_log_is(options, tmp_path, monkeypatch):
    failed = SimpleNamespace(poll=lambda: 2)
    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._start", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"ended with exit status 2 .*log.txt"):
        run_once(CONFIG, options, tmp_path / "run")


def result(error: float) -> dict:
    return {"classification": {"top1_error": error}, "training": {"iterations": 64}}


def test_a_run_is_not_restarted_while_its_process_is_alive(options, tmp_path, monkeypatch):
    """Check that the folder stays locked if a training process outlives its parent command."""
    (tmp_path / "run").mkdir()
    with folder_lock.only_writer(tmp_path / "run") as lock:
        survivor = _start(["sleep", "60"], quiet=True, share=1, lock=lock.fileno())
    ended = SimpleNamespace(poll=lambda: 2)
    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._start", lambda *_, **__: ended)
    monkeypatch.setattr(folder_lock, "_PAUSE", 0)
    with pytest.raises(UserError, match="Another run is writing to"):
        run_once(CONFIG, options, tmp_path / "run")
    survivor.kill()
    survivor.wait()
    with pytest.raises(UserError, match="exit status 2"):
        run_once(CONFIG, options, tmp_path / "run")


def test_two_runs_in_one_folder_are_rejected(tmp_path):
    with pytest.raises(UserError, match="same output folder"):
        run_all(seed_runs(CONFIG, [1, 1], [], tmp_path))


def test_seeds_have_one_folder_each_and_are_summarised(tmp_path, monkeypatch):
    calls = []

    def train(run, *_, **arguments):
        calls.append((list(run.options), run.output_dir.name, arguments))
        return result(6.0 + len(calls))

    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._train", train)
    config = "configs/cifar10_se_resnet110.yaml"
    found = run_all(seed_runs(config, [3, 5], [], tmp_path), quiet=True)
    assert [call[:2] for call in calls] == [(["SEED", "3"], "seed3"), (["SEED", "5"], "seed5")]
    assert all(arguments["quiet"] for _, _, arguments in calls)
    report = runs_report(config, [], {"seed 3": found[0], "seed 5": found[1]}).splitlines()
    header = [cell.strip() for cell in report[0].strip("|").split("|")]
    assert header == ["", "seed 3", "seed 5", "mean", "std"]
    cells = [cell.strip() for cell in report[2].strip("|").split("|")]
    assert cells == ["classification/top1_error", "7.000", "8.000", "7.500", "0.707"]
    assert "SE-ResNet-110: 5.21" in report[-1]
    assert "Table IV" in report[-1]


@pytest.mark.long
@pytest.mark.usefixtures("trains")
def test_a_classifier_is_trained_on_each_fold(tree, tmp_path, capsys):
    folds, output = tmp_path / "folds", tmp_path / "output"
    prepare("split", [str(tree), "--output", str(folds), "--folds", "2"])
    words = ["--config-file", CONFIG, "--folds", str(folds), "--output", str(output), "--quiet"]
    sweep([*words, "MODEL.BACKBONE.ARCH", "cifar_resnet8"])
    table = capsys.readouterr().out
    rows = {row[1]: row[3::2] for row in map(str.split, table.splitlines()) if len(row) > 4}
    errors = []
    for fold in ("fold0", "fold1"):
        found = finished(output / fold)["classification"]
        lines = (folds / f"{fold}_val.csv").read_text().splitlines()
        assert found["images"] == len(lines) - 1 == 8
        errors.append(found["top1_error"])
    expected = [*errors, statistics.mean(errors), statistics.stdev(errors)]
    assert rows["classification/top1_error"][:4] == [f"{value:.3f}" for value in expected]


WAITS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
signal.pause()
"""


def test_after_the_time_limit_runs_stop_and_no_others_start(options, tmp_path, monkeypatch):
    started = []

    def start(command, **_):
        process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE)
        process.stdout.readline()
        started.append(command)
        return process

    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._start", start)
    runs = seed_runs(CONFIG, [0, 1, 2], options, tmp_path)
    assert run_all(runs, jobs=2, minutes=1 / 60) == [None, None, None]
    assert sorted(words[-1] for words in started) == [
        str(tmp_path / name) for name in ("seed0", "seed1")
    ]


def test_ctrl_c_that_ends_the_process_first_is_not_a_failed_run(options, tmp_path, monkeypatch):
    """Check that Ctrl-C is not reported as a failed run if the training process ends first.

    In a terminal, Ctrl-C sends SIGINT to the training process and to its parent process.
    """

    def start(command, **_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return SimpleNamespace(poll=lambda: -signal.SIGINT)

    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._start", start)
    assert run_all(seed_runs(CONFIG, [0, 1], options, tmp_path)) == [None, None]


def test_a_run_from_other_weights_in_the_same_file_is_rejected(options, tmp_path, monkeypatch):
    ended = SimpleNamespace(poll=lambda: 2)
    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._start", lambda *_, **__: ended)
    weights = tmp_path / "weights.pth"
    words = [*options, "MODEL.WEIGHTS", str(weights)]
    weights.write_bytes(b"first")
    for content, message in ((b"first", "exit status 2"), (b"second", "SHA-256 of MODEL.WEIGHTS")):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=message):
            run_once(CONFIG, words, tmp_path / "run")
    weights.unlink()  # hashes can't be compared without the file
    with pytest.raises(UserError, match="exit status 2"):
        run_once(CONFIG, words, tmp_path / "run")


@pytest.mark.long
def test_folds_of_a_detector_are_registered_with_their_images(shared_data, tmp_path):
    root = shared_data / "coco128"
    source, images = root / "annotations" / "instances_train2017.json", root / "train2017"
    split_data(source, tmp_path, Split(folds=2))
    config = "configs/instant/demo_faster_rcnn_se_r18.yaml"
    folds = fold_options(config, tmp_path, [], images=images)
    cfg = load_config(config, folds["fold1"])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("fold1_train",), ("fold1_val",))
    register_datasets(cfg.DATASETS.REGISTER)
    numbers = [len(DatasetCatalog.get(name)) for name in ("fold1_train", "fold1_val")]
    written = [
        json.loads((tmp_path / f"fold1_{part}.json").read_text()) for part in ("train", "val")
    ]
    assert numbers == [len(content["images"]) for content in written]
    assert sum(numbers) == 128
    with pytest.raises(UserError, match="image folder with --images"):
        fold_options(config, tmp_path, [])
    with pytest.raises(UserError, match=r"contains 0 folds for .*; expected fold0_train.csv"):
        fold_options(CONFIG, tmp_path, [])


def test_a_record_that_fails_does_not_prevent_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._train", lambda *_, **__: {})
    recorded = []

    def record(run):
        recorded.append(run.output_dir.name)
        if len(recorded) == 1:
            raise UserError("The first record is invalid.")

    with pytest.raises(UserError, match="first record"):
        run_all(seed_runs(CONFIG, [0, 1], [], tmp_path), on_finish=record)
    assert recorded == ["seed0", "seed1"]


def test_mean_and_deviation_equal_those_of_a_sample():
    summary = mean_and_deviation([result(error) for error in (5.0, 6.0, 10.0)])
    assert summary["classification/top1_error"] == (7.0, pytest.approx(7**0.5))
    assert math.isnan(mean_and_deviation([result(5.0)])["training/iterations"][1])
    assert metrics(json.loads(json.dumps(result(5.0)))) == {
        "classification/top1_error": 5.0,
        "training/iterations": 64.0,
    }
