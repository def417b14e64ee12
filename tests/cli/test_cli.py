"""Tests for the ``senet`` command, its argument parsers and option values."""

import argparse
import importlib
import re
import subprocess
import sys
from importlib import metadata

import pytest
from detectron2.engine import default_argument_parser

from senet_transfer.analysis.ablation import PAPER
from senet_transfer.cli import arguments as choices
from senet_transfer.cli.analysis import sweep
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.data import PREPARATIONS
from senet_transfer.cli.main import COMMANDS
from senet_transfer.config import get_senet_config
from senet_transfer.data.cifar.archives import DOWNLOADS
from senet_transfer.data.detection.formats.source import FORMATS
from senet_transfer.data.images import imagenet
from senet_transfer.data.images.multi_scale import CROPS
from senet_transfer.data.images.places365 import SIZES, SPLITS
from senet_transfer.data.images.transforms import EVAL_MODES
from senet_transfer.weights import FAMILIES
from senet_transfer.weights.convert import TARGETS
from tests.processes import ROOT, call


def arguments_of(parser: argparse.ArgumentParser) -> dict[str, tuple]:
    """Map each argument of a parser to its option strings, nargs, default and type."""
    return {
        action.dest: (action.option_strings, action.nargs, action.default, action.type)
        for action in parser._actions
    }


def test_training_accepts_every_argument_of_detectron2s_parser():
    ours, theirs = arguments_of(argument_parser()), arguments_of(default_argument_parser())
    # The default in our parser is [] instead of None.
    theirs["opts"] = (*theirs["opts"][:2], ours["opts"][2], theirs["opts"][3])
    assert {name: ours[name] for name in theirs} == theirs
    own = {"classes", "data", "dataset", "deterministic", "images", "iou_types", "overwrite"}
    own |= {"quiet", "val"}
    assert set(ours) - set(theirs) == own


@pytest.mark.parametrize(
    ("stated", "values"),
    [
        (choices.ABLATION_AXES, PAPER),
        (choices.CIFAR_DOWNLOADS, DOWNLOADS),
        (choices.DETECTION_FORMATS, tuple(FORMATS)),
        (choices.CROPS, CROPS),
        (choices.EVAL_MODES, EVAL_MODES),
        (choices.PLACES365_SIZES, SIZES),
        (choices.PLACES365_SPLITS, SPLITS),
        (choices.IMAGENET_SPLITS, imagenet.SPLITS),
        (choices.WEIGHT_FAMILIES, FAMILIES),
        (choices.WEIGHT_TARGETS, TARGETS),
    ],
)
def test_the_listed_choices_match_the_package(stated, values):
    assert stated == tuple(values)


def test_the_listed_config_keys_match_the_config():
    assert set(choices.CONFIG_KEYS) == set(get_senet_config())


def test_multi_value_options_do_not_consume_the_config_options():
    names = [name for name, _ in COMMANDS.values()]
    modules = [importlib.import_module(f"senet_transfer.cli.{name}") for name in names]
    parsers = [made.parser() for made in (*modules, *PREPARATIONS.values())]
    number = 0
    for parser in (parser for parser in parsers if "opts" in arguments_of(parser)):
        actions = {flag: action for action in parser._actions for flag in action.option_strings}
        needed = [flag for flag, action in actions.items() if action.required]
        if actions.pop("--opts", None):  # the values of --opts are config options
            continue
        assert not [flag for flag, action in actions.items() if action.nargs in ("+", "*")]
        for flag in parser.lists:
            kind, choices = actions[flag].type or str, actions[flag].choices
            values = list(choices)[:2] if choices else ["3", "4"] if kind is int else ["RBC", "WBC"]
            words = [word for other in needed if other != flag for word in (other, "x")]
            found = parser.parse_args([*words, flag, *values, "MODEL.DEVICE", "cpu", "SEED", "1"])
            assert getattr(found, actions[flag].dest) == [kind(value) for value in values]
            assert found.opts == ["MODEL.DEVICE", "cpu", "SEED", "1"]
            number += 1
    assert number >= 10
    found = sweep.parser().parse_args(["--seed", "0", "1", "--quiet"])
    assert (found.seeds, found.opts) == ([0, 1], [])


def test_every_command_has_a_module_and_a_parser():
    for module, _ in COMMANDS.values():
        assert callable(importlib.import_module(f"senet_transfer.cli.{module}").command)


def test_the_help_of_senet_names_senet_and_no_script():
    for module, _ in COMMANDS.values():
        text = importlib.import_module(f"senet_transfer.cli.{module}").parser().format_help()
        assert not re.search(r"python \w+/|(?<!torchrun --nproc-per-node 8 )tools/", text), module


def test_senet_passes_the_arguments_on_and_names_the_command():
    help_text = call(sys.executable, "-m", "senet_transfer.cli.main", "--help").stdout
    for name, (_, text) in COMMANDS.items():
        assert f" {name} " in help_text
        assert text in help_text
    found = call(sys.executable, "-m", "senet_transfer.cli.main", "data", "shapes", "--help").stdout
    assert "--train" in found
    found = call(sys.executable, "-m", "senet_transfer.cli.main", "report", "--images")
    assert found.returncode == 2
    assert "usage: senet report" in found.stderr


def test_a_shell_completes_commands_data_sets_and_options(tmp_path):
    script = call(sys.executable, "-m", "senet_transfer.cli.main", "completion", "bash").stdout
    (tmp_path / "senet.sh").write_text(script)
    lines = {"senet dat": "data", "senet data che": "check", "senet predict --wei": "--weights"}
    for line, expected in lines.items():
        words = f"COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}"
        completed = f'. ./senet.sh; {words}; _shtab_senet; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(
            ["bash", "-c", completed], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.long
def test_env_prints_the_versions_that_a_bug_report_needs():
    found = call(sys.executable, "-m", "senet_transfer.cli.main", "env").stdout
    assert found.startswith("senet env\n")
    for name in ("senet_transfer", "torch", "torchvision", "pillow"):
        assert f"\n{name}=={metadata.version(name)}\n" in found
    assert "detectron2" in found
    assert "GPU available" in found


SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "datasets")
    for path in (ROOT / folder).glob("*.py")
    if path.name
    not in ("install_detectron2.py", "classify_onnx.py", "detect_onnx.py", "onnx_images.py")
)


def test_help_imports_neither_torch_nor_detectron2():
    # All scripts run in one process to save time. A script fails if it imports a heavy module.
    code = f"""
import runpy, sys
for script in {SCRIPTS!r}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        assert error.code == 0, script
    for heavy in ("torch", "detectron2", "torchvision", "numpy"):
        assert heavy not in sys.modules, (script, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(SCRIPTS)
