"""Tests that progress bars are shown only on a terminal."""

import io
import re
import runpy
from pathlib import Path

import pytest

from senet_transfer.utils.progress import no_bars, progress

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "datasets").glob("*.py")])
# Commands without --quiet, because they finish in seconds or show only pip's output.
AT_ONCE = (
    "classify_onnx.py",
    "detect_onnx.py",
    "install_detectron2.py",
    "onnx_images.py",
    "prepare_coco.py",
)
# Command that shows the progress of pip in its own format.
OWN_PROGRESS = ("pip_progress.py",)


class Screen(io.StringIO):
    """Stand-in for stderr that acts as a terminal or as a pipe."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_bar_is_shown_only_on_a_terminal_and_not_when_quiet(monkeypatch, terminal, quiet):
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    assert list(progress(range(3), quiet=quiet, unit="image")) == [0, 1, 2]
    assert ("3/3" in screen.getvalue()) == (terminal and not quiet)
    assert terminal and not quiet or not screen.getvalue()


@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_command_has_no_bar_in_nested_calls(monkeypatch, quiet):
    screen = Screen(terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    with no_bars(), no_bars(quiet):
        assert list(progress(range(3))) == [0, 1, 2]
    assert not screen.getvalue()
    with no_bars(quiet):
        list(progress(range(3)))
    assert bool(screen.getvalue()) is not quiet


@pytest.mark.parametrize(
    "path",
    [path for path in COMMANDS if path.name not in (*AT_ONCE, *OWN_PROGRESS)],
    ids=lambda path: path.name,
)
def test_every_command_that_takes_long_can_be_quiet(monkeypatch, capsys, path):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert "--quiet" in capsys.readouterr().out


def test_all_progress_bars_have_one_implementation():
    for path in [*(ROOT / "senet_transfer").rglob("*.py"), *COMMANDS]:
        if path.name != "progress.py":
            assert not re.search(r"^\s*(from|import) (tqdm|rich)", path.read_text(), re.M), path
