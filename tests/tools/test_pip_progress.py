"""Tests for the progress output of `make setup`, with a fake pip script."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "pip_progress.py"

OUTPUT = """\
Obtaining file:///clone
  Installing build dependencies: started
Collecting torch==2.14.1 (from -c constraints.txt (line 150))
  Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)
Collecting fvcore>=0.1.5
  Using cached fvcore-0.1.5.post20221221.tar.gz (50 kB)
Requirement already satisfied: pip in ./.venv
Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl (830.1 MB)
Using cached scikit_learn-1.9.0-cp311-cp311-linux_x86_64.whl (9 MB)
Installing collected packages: torch, scikit-learn, fvcore
Successfully installed fvcore-0.1.5 scikit-learn-1.9.0 torch-2.14.1
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("pip_progress", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(script, tmp_path):
    """Return a function that runs pip_progress.py with a fake pip and returns the exit status."""
    (tmp_path / "constraints.txt").write_text("# versions\ntorch==2.14.1\nfvcore==1\n\nnumpy==2\n")
    (tmp_path / "output.txt").write_text(OUTPUT)

    def run(code: str) -> int:
        fake = tmp_path / "fake_pip.py"
        fake.write_text(code)
        files = ["--log", str(tmp_path / "setup.log")]
        files += ["--constraints", str(tmp_path / "constraints.txt")]
        return script.main([*files, "--", "--editable", "."], pip=(str(fake),))

    return run


def test_each_step_is_one_line_and_the_log_has_everything(install, tmp_path, capfd):
    assert install(f"print(open({str(tmp_path / 'output.txt')!r}).read(), end='')") == 0
    said, errors = capfd.readouterr()
    *steps, end = said.splitlines()
    assert steps == [
        "Resolving about 3 packages ...",
        "Downloading about 3 packages ...",
        "Installing 3 packages ...",
    ]
    assert end == "Installed 3 packages in 0 s"
    assert not errors
    command, log = (tmp_path / "setup.log").read_text().split("\n", 1)
    assert command.endswith(f"--constraint {tmp_path / 'constraints.txt'} --editable .")
    assert log == OUTPUT


def test_a_terminal_shows_one_line_with_package_and_size(script, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    code = f"import sys; sys.stdout.write({OUTPUT!r})"
    assert script.run([sys.executable, "-c", code], tmp_path / "log", 3, out) == 0
    *updates, end = out.getvalue().split("\r\033[K")
    assert end == "Installed 3 packages in 0 s\n"
    assert "\n" not in "".join(updates)
    assert "Resolving package 1 of about 3: torch (0 s)" in updates
    assert "Downloading package 1 of about 3: torch 2.14.1, 830.1 MB (0 s)" in updates
    assert "Downloading package 2 of about 3: scikit_learn 1.9.0, 9 MB (0 s)" in updates
    assert "Installing 3 packages (0 s)" in updates


def test_a_failure_prints_the_last_lines_the_log_and_pips_status(install, tmp_path, capfd):
    code = "import sys\nfor n in range(99): print('line', n)\nprint('ERROR: no', file=sys.stderr)"
    assert install(f"{code}\nsys.exit(3)") == 3
    said, errors = capfd.readouterr()
    assert "Installed" not in said
    lines = errors.splitlines()
    assert lines[-1] == f"pip failed with status 3. Full output: {tmp_path / 'setup.log'}"
    assert len(lines) == 16
    assert "ERROR: no" in lines
    assert "line 98" in lines
    assert "line 0\n" in (tmp_path / "setup.log").read_text()


def test_nothing_to_install_is_not_counted_as_installed(install, capfd):
    assert install("print('Requirement already satisfied: torch in x')") == 0
    assert capfd.readouterr().out.splitlines()[-1] == "No new packages in 0 s"


def test_the_script_needs_only_the_standard_library():
    command = [sys.executable, "-I", "-S", SCRIPT, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--constraints" in done.stdout
