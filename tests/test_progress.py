"""Bars are for people: on a terminal, and nowhere else."""

import io
import re
from pathlib import Path

import pytest

from senet_transfer.progress import progress

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [*(ROOT / "tools").glob("*.py"), *(ROOT / "datasets").glob("*.py")]


class Screen(io.StringIO):
    """What stderr is on a terminal, or in a pipe."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone_and_not_when_quiet(monkeypatch, terminal, quiet):
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    assert list(progress(range(3), quiet=quiet, unit="image")) == [0, 1, 2]
    assert ("3/3" in screen.getvalue()) == (terminal and not quiet)
    assert terminal and not quiet or not screen.getvalue()


def test_there_is_one_kind_of_bar():
    for path in [*(ROOT / "senet_transfer").rglob("*.py"), *COMMANDS]:
        if path.name != "progress.py":
            assert not re.search(r"^\s*(from|import) (tqdm|rich)", path.read_text(), re.M), path
