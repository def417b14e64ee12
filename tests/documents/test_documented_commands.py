"""Tests that documented commands are valid and write the output files that they name."""

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from senet_transfer.cli.main import command as senet
from senet_transfer.config.load import load_config
from tests.documents.commands import (
    COMMAND_NAME,
    COMMANDS,
    DOCUMENTS,
    NOT_RUN,
    PROGRAMS,
    ROOT,
    RULES,
    Command,
    code,
    commands_in,
    run_here,
)
from tests.documents.sandbox import call, environment, make_sandbox
from tests.documents.warm import WarmPython

# ---- parsing the commands as written


def _texts(folder: str) -> Iterator[tuple[str, str]]:
    """Yield (path, string) pairs for all strings and docstrings in a folder's Python code."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.relative_to(ROOT).as_posix(), node.value


def _commands_in_code(folder: str) -> list[Command]:
    """Return the commands in a folder's config headers and in strings in its Python files."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.yaml")):
        head = re.sub(r"\\\n#\s*", "", path.read_text())
        if match := re.search(r"^# Command:\s+(.*)$", head, re.M):
            found.append(Command(path.relative_to(ROOT).as_posix(), match[1]))
    for name, text in _texts(folder):
        joined = re.sub(r"\s*\\\n\s*", " ", text)
        lines = re.findall(r"^ *((?:python \w+/|torchrun |(?<= )senet [a-z]+ ).*)$", joined, re.M)
        found += commands_in(name, text) + [Command(name, line) for line in lines]
    return found


DOCUMENTED = [command for commands in COMMANDS.values() for command in commands]


class _ParsedError(Exception):
    """Exception that ends a script after it has parsed its command line."""


def _parse(monkeypatch, words: list[str]) -> argparse.Namespace | None:
    """Return the parsed arguments of a script.

    Return None for ``--help`` and for scripts without an argument parser.
    """
    script, parse = ROOT / words[0], argparse.ArgumentParser.parse_args
    assert script.is_file(), f"{words[0]} does not exist"
    if len(words) == 2 and words[1] == "--help" or "sys.argv[1:]" in script.read_text():
        return None

    def stop(parser, *args):
        raise _ParsedError(parse(parser, *args))

    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(_ParsedError) as caught:
        runpy.run_path(str(script), run_name="__main__")
    return caught.value.args[0]


INSTALLED = {"senet-train": "tools/train_net.py", "senet-predict": "tools/predict.py",
             "senet-eval-places365": "tools/eval_places365.py"}  # fmt: skip
# Subcommands of `senet`, with the equivalent scripts.
SENET = {"train": "tools/train_net.py", "eval": "tools/eval_classifier.py",
         "predict": "tools/predict.py", "export": "tools/export.py",
         "convert": "tools/convert_weights.py", "report": "tools/report.py",
         "complexity": "tools/complexity.py", "gates": "tools/analyze_excitations.py",
         "sweep": "tools/run_seeds.py", "ablation": "tools/ablation.py"}  # fmt: skip


def _script(words: list[str]) -> list[str] | None:
    """Return the script that a command runs, with its arguments, or None if there is no script."""
    if words[0] == "python":
        return words[1:]
    if words[0] == "torchrun":
        return words[words.index("tools/train_net.py") :]
    if words[0] == "senet" and words[1] in SENET:
        return [SENET[words[1]], *words[2:]]
    return [INSTALLED[words[0]], *words[1:]] if words[0] in INSTALLED else None


def _check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a command's arguments and config are valid."""
    words = command.words
    assert words[0] in PROGRAMS, "add the program to PROGRAMS in tests/documents/commands.py"
    if re.fullmatch(COMMAND_NAME, command.text):
        monkeypatch.setattr(sys, "argv", [*words, "--help"])
        with pytest.raises(SystemExit) as ended:
            senet()
        assert not ended.value.code
        return
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    if (script := _script(words)) is None or script[0].startswith("tests/"):
        return
    args = _parse(monkeypatch, script)
    configs = getattr(args, "config_file", "")
    for config in configs if isinstance(configs, list) else [configs]:
        if config.endswith(".py"):  # test_lazy_config.py loads this config
            return
        if config and not config.startswith("output/"):
            monkeypatch.chdir(ROOT)
            assert config.startswith("configs/") or words[0] in (*INSTALLED, "senet")
            load_config(config, getattr(args, "opts", []))
        else:
            load_config("", getattr(args, "opts", []))


@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda c: f"{c.document}: {c.text}")
@pytest.mark.long
def test_commands_are_accepted_by_their_tools(command, monkeypatch):
    _check(command, monkeypatch)


@pytest.mark.parametrize("folder", ["configs", "datasets", "senet_transfer", "tools"])
@pytest.mark.long
def test_commands_in_the_code_are_accepted_by_their_tools(folder, monkeypatch):
    commands = _commands_in_code(folder)
    assert commands
    for command in commands:
        print(f"{command.document}: {command.text}")
        with monkeypatch.context() as patched:
            _check(command, patched)


def test_cluster_scripts_are_complete_with_a_valid_training_command(
    monkeypatch,
):
    scripts = [text for page in DOCUMENTS.values() for kind, text in code(page) if kind == "bash"]
    assert len(scripts) == 1
    subprocess.run(["bash", "-n"], input=scripts[0], text=True, check=True)
    line = re.sub(r"\s*\\\n\s*", " ", scripts[0]).partition("srun ")[2].splitlines()[0]
    words = shlex.split(re.sub(r"\"\$.*?\"|\$\w+", "word", re.sub(r"\$\(.*?\)", "", line)))
    args = _parse(monkeypatch, _script(words))
    monkeypatch.chdir(ROOT)
    load_config(args.config_file, args.opts)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_code_block_and_command_is_recognised(document):
    text = DOCUMENTS[document]
    kinds = {kind for kind, _ in code(text)}
    assert kinds <= {"sh", "bash", "python", "text", "yaml", "inline"}, (
        "specify each code block's language"
    )
    assert not re.search(
        r"^\s*\n(    |\t)\s*\S", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M
    )
    hidden = [c for kind, c in code(text) if kind == "inline" and re.match(r"[\w.]*/\S+\.py\s", c)]
    assert not hidden, "start each command with its program, such as python"
    assert text.replace("```", "").count("`") % 2 == 0


def test_every_exception_and_every_rule_is_needed():
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, shlex.join(c.words)) for c in DOCUMENTED), pattern
    for rule in RULES:
        assert any(rule.apply(c.words) != c.words for c in DOCUMENTED), rule.why


def test_commands_are_found_in_blocks_in_sentences_and_in_tables():
    text = (
        "`make demo` and\n```sh\npython a.py \\\n    --b c  # why\n```\n| `torchrun\nx.py` | `x` |"
    )
    found = [command.words for command in commands_in("x.md", text)]
    assert found == [["make", "demo"], ["python", "a.py", "--b", "c"], ["torchrun", "x.py"]]


# ---- running the commands


MEASURES = ("complexity.py", "benchmark.py", "eval_classifier.py", "eval_places365.py")


def _promised(words: list[str], printed: str) -> list[str]:
    """Return the paths of the files and folders that a command is expected to write.

    These are the output paths in the command's arguments. If the printed output ends with a file
    path, this path is also included.
    """
    found = [b for a, b in zip(words, words[1:], strict=False) if a in ("--output", "OUTPUT_DIR")]
    if "tools/convert_weights.py" in words:
        found.append(words[words.index("tools/convert_weights.py") + 2])
    last = (printed.split() or [""])[-1] if words[-1] != "help" else ""
    return found + ([last] if re.fullmatch(r"[\w./-]+\.(html|json|csv|md)", last) else [])


def _fault(command: Command, folder: Path, python: WarmPython) -> str | None:
    """Run a command and return a description of its failure, or None if it succeeds."""
    line, start = shlex.join(command.to_run), time.time()
    done = call(command.to_run, folder, python)
    printed = done.stdout + done.stderr
    print(f"\n{time.time() - start:6.1f} s  {line}", end="")
    if done.returncode:
        return f"{line}\nended with {done.returncode}: {printed[-1500:]}"
    if not printed.strip():
        return f"{line}\nprinted nothing"
    if any(name in line for name in MEASURES) and not re.search(r"\d\.\d|\d,\d", done.stdout):
        return f"{line}\nprinted no number: {done.stdout[-1500:]}"
    for place in map(folder.joinpath, _promised(command.to_run, done.stdout)):
        files = [path for path in (place, *place.rglob("*")) if path.is_file()]
        made = any(path.stat().st_size and path.stat().st_mtime > start - 1 for path in files)
        if not made and "--list" not in command.words:
            return f"{line}\nwrote nothing to {place}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in COMMANDS if run_here(name)])
def test_the_commands_of_a_document_have_the_documented_effect(document, tmp_path):
    commands = run_here(document)
    folder = make_sandbox(tmp_path / "sandbox", [command.to_run for command in commands])
    with WarmPython(folder, environment(folder)) as python:
        found = [_fault(command, folder, python) for command in commands]
    faults = [fault for fault in found if fault]
    assert not faults, "\n\n".join(faults)
