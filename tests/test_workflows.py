"""Tests for CI workflows, pre-commit hooks and the container image."""

import fnmatch
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT, call

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
# Commands that are not Makefile targets, with the test that covers each, or why there is none.
OTHER_COMMANDS = {
    "docker run --rm senet_transfer --version": "test_senet_prints_its_version_without_torch",
    "pipx run build": "test_a_source_distribution_builds_the_same_wheel",
    "pipx run twine check --strict dist/*": "needs twine, which is not installed for the tests",
    'ls "dist/senet_transfer-${GITHUB_REF_NAME#v}.tar.gz"': "test_a_release_is_named_by_its_tag",
    'gh release create "$GITHUB_REF_NAME" dist/* --verify-tag --draft': "needs the host",
}


def load(path: Path) -> dict:
    # YAML 1.1 parses the key `on` as True.
    return {("on" if key is True else key): value for key, value in _yaml(path).items()}


def _yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def _make(*words: str) -> subprocess.CompletedProcess:
    # Clear make's variables, because a make inside `make test` behaves differently.
    return call("make", "--no-print-directory", *words, MAKEFLAGS="", MAKELEVEL="0")


def commands() -> list[str]:
    """Return each line of the shell commands in all workflows."""
    found = [step["run"] for path in WORKFLOWS for step in steps(load(path)) if "run" in step]
    return [line.strip() for text in found for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_workflow_runs_only_make_targets_and_commands_tested_elsewhere(command):
    if command in OTHER_COMMANDS:
        return
    program, *targets = shlex.split(command)
    assert program == "make"
    assert targets
    listed = _make("help").stdout
    for target in targets:
        assert _make("--dry-run", target).returncode == 0
        assert f"make {target} " in listed


def test_every_other_listed_command_is_used():
    assert set(OTHER_COMMANDS) <= set(commands())


def test_public_ci_runs_the_checks_of_the_projects_ci():
    own = set(re.findall(r"^step (make \S+)", (ROOT / ".ci" / "run").read_text(), re.M))
    # `make coverage` runs the same tests as `make test`. `make test-narrow` repeats the training
    # tests with narrower vector instructions.
    assert own - set(commands()) == {"make test", "make test-narrow"}
    recipes = [_make("--dry-run", t).stdout for t in ("test", "coverage")]
    test, coverage = (recipe.replace("\\\n", "").split("-m pytest ")[1] for recipe in recipes)
    assert coverage.startswith(test.strip())


def test_the_tests_repeated_with_narrower_instructions_exist():
    paths = re.findall(r"tests/\S+\.py", _make("--dry-run", "test-narrow").stdout)
    assert len(paths) > 3
    assert all((ROOT / path).is_file() for path in paths)


def test_public_ci_covers_every_supported_python():
    (versions,) = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', _text("pyproject.toml"))
    expected = [f"3.{minor}" for minor in range(int(versions[0]), int(versions[1]))]
    ci = load(GITHUB / "workflows" / "ci.yml")
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python-version"] == expected


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_least_permissions_and_a_timeout(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
    for step in steps(workflow):
        if action := step.get("uses"):
            assert re.fullmatch(r"actions/[\w-]+@v\d+", action)
            if action.startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_pull_requests_never_run_on_self_hosted_gpu_runners():
    for path in WORKFLOWS:
        for job in load(path)["jobs"].values():
            if "self-hosted" in job["runs-on"]:
                assert "github.event_name != 'pull_request'" in job["if"]


@pytest.mark.parametrize(
    "path",
    [*WORKFLOWS, *(ROOT / name for name in ("Dockerfile", ".pre-commit-config.yaml"))],
    ids=lambda path: path.name,
)
def test_no_host_address_is_hard_coded(path):
    # Packages come from the indexes and registries that pip and Docker are configured with.
    assert not re.findall(r"://|\b[\w-]+\.(?:com|dev|io|net|org)\b", path.read_text())


def test_a_release_is_named_by_its_tag(tmp_path):
    (command,) = (command for command in OTHER_COMMANDS if command.startswith("ls "))
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "senet_transfer-1.2.3.tar.gz").touch()
    for tag, status in (("v1.2.3", 0), ("v1.2.4", 2)):
        environment = {"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": tag}
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=False)
        assert done.returncode == status


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*_*.yml")))
def test_an_issue_form_has_required_fields(path):
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked)
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_pre_commit_hooks_are_local_and_run_the_tools_of_make_lint():
    (repo,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    lint = _make("--dry-run", "lint").stdout
    of_make = set(re.findall(r"-m ((?:ruff )?[\w-]+)", lint.partition("touch")[2] or lint))
    of_hooks = {re.search(r"-m ((?:ruff )?[\w-]+)", hook["entry"])[1] for hook in repo["hooks"]}
    assert of_hooks == of_make
    for hook in repo["hooks"]:
        assert hook["entry"].startswith(".venv/bin/python ")


# ---- the container image


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def instructions() -> list[tuple[str, str]]:
    """Return the instructions in the Dockerfile as (name, arguments) pairs."""
    lines = [line for line in _text("Dockerfile").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]


def test_files_copied_into_the_image_exist_and_are_not_ignored():
    patterns = [line for line in _text(".dockerignore").splitlines() if line[0] not in "#"]
    assert patterns[0] == "*"
    kept = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    copied = [path for name, args in instructions() if name == "COPY" for path in args.split()[:-1]]
    for path in copied:
        assert (ROOT / path).exists()
        assert any(fnmatch.fnmatch(path, pattern) for pattern in kept), path
    assert set(kept) == set(copied)


def test_the_image_runs_senet_as_a_user_without_privileges():
    final = dict(instructions())  # only the last instruction of a kind takes effect
    assert int(final["USER"]) > 0
    assert final["ENTRYPOINT"] == '["senet"]'
    assert final["FROM"].startswith("nvidia/cuda:")


def test_the_image_has_the_versions_that_the_tests_passed_with():
    runs = " ".join(args for name, args in instructions() if name == "RUN")
    for command in re.findall(r"pip install .*?(?= &&|$)", runs):
        assert "--constraint constraints.txt" in command
    assert "python tools/install_detectron2.py" in runs
    cuda = re.search(r"^cuda-toolkit==(\d+\.\d+)", _text("constraints.txt"), re.M)[1]
    assert dict(instructions())["FROM"].startswith(f"nvidia/cuda:{cuda}.")
