"""Tests for the commit that is recorded for a run."""

import subprocess

import pytest

from senet_transfer.utils import environment


@pytest.mark.parametrize(("folder", "known"), [("", True), (".venv/lib/site-packages", False)])
def test_the_commit_is_that_of_a_clone_and_not_of_the_users_repository(
    folder, known, tmp_path, monkeypatch
):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    package = tmp_path / folder / "senet_transfer" / "utils"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    commit = environment.origin(on_gpu=False)["commit"]
    assert commit == (head.stdout.strip() if known else "unknown")
