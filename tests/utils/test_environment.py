"""Tests for recording the Git commit of the code that a run uses."""

import subprocess
from pathlib import Path

import pytest

from senet_transfer.utils import environment


@pytest.fixture
def commit_of(tmp_path, monkeypatch):
    """Create a Git repository, and return a function that determines the recorded commit.

    The function simulates an installation of this package in the given folder of the repository,
    and returns the commit that would be recorded with a run's results.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(folder: str) -> str:
        package = tmp_path / folder / "senet_transfer" / "utils"
        package.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
        return environment.origin(on_gpu=False)["commit"]

    monkeypatch.delenv("GIT_COMMIT", raising=False)
    for name in ("code.py", "results/gates.json"):
        Path(tmp_path, name).parent.mkdir(exist_ok=True)
        Path(tmp_path, name).write_text("as committed")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit.head = git("rev-parse", "HEAD")
    return commit


def test_the_commit_is_of_the_clone_and_not_of_the_users_repository(commit_of):
    assert commit_of("") == commit_of.head
    assert commit_of(".venv/lib/site-packages") == "unknown"


def test_changed_code_makes_a_commit_dirty_but_changed_results_do_not(commit_of, tmp_path):
    (tmp_path / "results" / "gates.json").write_text("drawn again")
    assert commit_of("") == commit_of.head
    (tmp_path / "code.py").write_text("changed")
    assert commit_of("") == f"{commit_of.head}-dirty"
