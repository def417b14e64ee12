"""Tests that commands end with the exit statuses listed in docs/reliability.md."""

import shutil

import pytest

# Training script that runs ``harm`` in each optimizer step.
_HARMED = """
import os, signal, sys, torch
step = torch.optim.SGD.step
def harmed(self, *args, **options):
    {harm}
    return step(self, *args, **options)
torch.optim.SGD.step = harmed
from senet_transfer.cli.main import command
command()
"""


def senet(*words: object) -> list[str]:
    """Return the Python command-line arguments that run a ``senet`` command."""
    return ["-m", "senet_transfer.cli.main", *map(str, words)]


@pytest.fixture
def bad(tmp_path):
    """Return the path of a file that is not a valid image, weight file or config."""
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"<!DOCTYPE html>")
    return path


def test_commands_end_with_the_documented_exit_statuses(words, tree, bad, tmp_path, run_python):
    run = words(**{"DATASETS.TEST": "()"})
    weights, photo = tmp_path / "run" / "model_final.pth", tree / "red" / "0.jpg"
    output = ("--output", tmp_path / "out")
    endless = ("train", *run, "--overwrite", "SOLVER.MAX_ITER", "100000")
    stop, bug = "os.kill(os.getpid(), signal.SIGTERM)", "raise KeyError('bug')"
    one = ("--workers", 1, "--quiet")
    tiny = tmp_path / "tiny"
    shutil.copytree(tree / "red", tiny / "red")
    shutil.copytree(tree / "green", tiny / "green")
    expected = [
        (0, senet("train", *run)),
        (2, senet("train", *run, "MODEL.WEIGHTS", bad, "--overwrite")),
        (0, senet("predict", "--weights", weights, "--input", photo, *output, "--quiet")),
        (2, senet("predict", "--weights", weights, "--input", photo, bad, *output, "--quiet")),
        (2, senet("predict", "--weights", weights)),
        (2, senet("export", "--weights", weights, "--output", tmp_path / "model.keras")),
        (0, senet("data", "folder", "--source", tiny, "--output", tmp_path / "shards", *one)),
        (2, senet("data", "folder", "--source", bad, *output, *one)),
        (2, senet("data", "nothing")),
        (1, ["-c", _HARMED.format(harm=bug), *endless]),
        (75, ["-c", _HARMED.format(harm=stop), *endless]),
    ]
    found = []
    for status, line in expected:
        done = run_python(*line)
        found.append((done.returncode, line))
        if status == 2:
            assert "error: " in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
    assert found == expected
