"""Tests for the command that prepares the CIFAR datasets."""

import numpy as np
from PIL import Image


def test_the_command_prepares_a_tree_and_reports_errors_without_a_traceback(tmp_path, run_python):
    def run(*arguments: object):
        return run_python("datasets/prepare_cifar.py", *arguments)

    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / split / "cat" / "a.png")
    done = run("--source", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "train.safetensors written: 1 images, 1 classes" in done.stderr
    assert (tmp_path / "out" / "test.safetensors").is_file()
    failed = run("--source", tmp_path / "absent", "--output", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {tmp_path / 'absent'} does not exist")
    assert "Traceback" not in failed.stderr
