"""Tests that a new run does not mix its output files with those of an earlier run."""

import os

import pytest

from senet_transfer import UserError
from senet_transfer.config.defaults import get_senet_config
from senet_transfer.engine.checkpoints.output_folder import (
    claim_output_folder,
    drop_earlier_log,
    log_size,
)
from senet_transfer.engine.setup import RunOptions, setup

WRITTEN = (
    "model_0000002.pth",
    "model_0000002.pth.sha256",
    "model_final.pth",
    "model_final.pth.sha256",
    "model_best.pth",
    "model_ema.pth",
    "last_checkpoint",
    "recent_checkpoints",
    "metrics.json",
    "results.json",
    "events.out.tfevents.1.host",
    "nonfinite_0000003_rank0.json",
    "inference/my_val/coco_instances_results.json",
    "inference/my_val/instances_predictions.pth",
    "inference/my_val/diagnostics.json",
    "inference_TTA/my_val/coco_instances_results.json",
    "inference/flowers/predictions.json",
)
# Files that must be kept: similar names, and files that only the user could have written.
KEPT = (
    "notes.txt",
    "model_zoo.pth",
    "se_resnet50.pth",
    "photo.jpg",
    "inference/my_val/notes.txt",
    "predictions/predictions.json",
    "other_run/model_final.pth",
    "other_run/metrics.json",
)


def write(folder, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content\n")


def claim(folder, weights="", **options) -> None:
    cfg = get_senet_config()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(folder), str(weights)
    claim_output_folder(cfg, **{"overwrite": False, "restarted": False, **options})


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["model_final.pth", "model_0000009.pth", "model_best.pth", "metrics.json"]
)
def test_a_folder_with_an_earlier_run_is_rejected_and_left_unchanged(tmp_path, name):
    write(tmp_path, [name, *KEPT])
    with pytest.raises(UserError, match=f"(?s){name}.*--resume.*another folder.*--overwrite"):
        claim(tmp_path)
    assert files(tmp_path) == {name, *KEPT}


def test_a_folder_without_a_run_is_accepted(tmp_path):
    claim(tmp_path / "missing")
    write(tmp_path, [*KEPT, "config.yaml", "log.txt", "results.json", "environment.txt"])
    (tmp_path / "metrics.json").touch()
    claim(tmp_path)


def test_overwriting_deletes_only_files_that_a_run_writes(tmp_path):
    write(tmp_path, [*WRITTEN, *KEPT])
    claim(tmp_path, overwrite=True)
    assert files(tmp_path) == set(KEPT)


def test_the_weights_to_start_from_are_not_deleted(tmp_path):
    write(tmp_path, WRITTEN)
    link = tmp_path / "start.pth"
    os.symlink(tmp_path / "model_best.pth", link)
    for weights in (tmp_path / "model_best.pth", link):
        with pytest.raises(UserError, match="--overwrite would delete"):
            claim(tmp_path, weights, overwrite=True)
    assert files(tmp_path) == {*WRITTEN, "start.pth"}


def test_a_command_that_the_launcher_restarts_keeps_its_files(tmp_path):
    write(tmp_path, ["metrics.json"])
    claim(tmp_path, restarted=True)
    assert files(tmp_path) == {"metrics.json"}


def test_the_log_keeps_only_the_lines_of_the_new_run(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("earlier\n")
    size = log_size(tmp_path)
    with open(log, "a") as stream:
        stream.write("before\n")
        stream.flush()
        drop_earlier_log(tmp_path, size)
        stream.write("after\n")
    assert log.read_text() == "before\nafter\n"
    assert log_size(tmp_path / "missing") == 0


@pytest.mark.parametrize("flag", ["resume", "eval_only"])
def test_overwriting_and_resuming_are_mutually_exclusive(flag):
    with pytest.raises(UserError, match="--overwrite.*can't be combined"):
        setup(RunOptions(overwrite=True, **{flag: True}))
