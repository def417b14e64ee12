"""Script that lists missing public names and saves the ``--help`` texts of all commands.

    python tests/compatibility/dump_interface.py NAMES.json OUTPUT.json

NAMES.json maps each module to a list of its public names. The script writes the names that can't be
imported, with the error messages, and the help text of each command to OUTPUT.json.
"""

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import runpy
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The benchmark is a developer tool and has moved from the package to tools/.
OUTSIDE = {"senet_transfer.analysis.benchmark": "benchmark"}


def find_missing(names: dict[str, list[str]]) -> dict[str, str]:
    """Map each public name that can't be imported to the error message."""
    missing = {}
    sys.path.insert(0, str(ROOT / "tools"))
    for old, members in names.items():
        module = OUTSIDE.get(old, old)
        for name in members:
            try:
                exec(f"from {module} import {name}" if name else f"import {module}", {})
            except Exception as error:
                missing[f"{module}.{name}"] = f"{type(error).__name__}: {error}"
    return missing


def read_help(name: str, command: Callable[[], object]) -> str:
    """Run a command with ``--help`` and return its output."""
    printed = io.StringIO()
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(printed):
        try:
            command()
        except SystemExit as end:
            if isinstance(end.code, int) and end.code:
                return f"exit status {end.code}"
            printed.write(end.code or "")
    return printed.getvalue()


def help_texts() -> dict[str, str]:
    """Return the help texts of the console commands and of the Python scripts.

    The scripts are those in ``tools/``, and ``datasets/prepare_*.py``. The texts are keyed by the
    command's name or the script's path, such as "tools/export.py".
    """
    os.environ["COLUMNS"] = "100"
    texts = {}
    scripts = [*ROOT.glob("tools/*.py"), *ROOT.glob("datasets/prepare_*.py")]
    for path in sorted(scripts):
        sys.path.insert(0, str(path.parent))
        name = path.relative_to(ROOT).as_posix()
        texts[name] = read_help(str(path), partial(runpy.run_path, path, run_name="__main__"))
        sys.path.pop(0)
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in commands.items():
        entry = importlib.metadata.EntryPoint(name, target, "console_scripts")
        texts[name] = read_help(name, entry.load())
    return texts


if __name__ == "__main__":
    names = json.loads(Path(sys.argv[1]).read_text())
    output = Path(sys.argv[2])
    missing = find_missing(names)
    output.write_text(json.dumps({"missing": missing, "help": help_texts()}))
