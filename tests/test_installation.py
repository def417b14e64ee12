"""Tests for `make setup`: pinned versions, atomic installation of Detectron2, error messages."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "install_detectron2.py"


@pytest.fixture
def installer(monkeypatch):
    """Load the installation script as a module, and hide any installed Detectron2 from it."""
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_installed", lambda: None)
    return module


@pytest.fixture
def wheel(tmp_path):
    """Write a small wheel with the same packaging errors as Detectron2's wheel.

    For example, it contains the top-level package ``tools``, which must not be installed.
    """
    info = "sal_detectron2-0.7.2.dist-info"
    path = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("detectron2/__init__.py", '__version__ = "0.7.2"\n')
        archive.writestr("detectron2/layers/__init__.py", "")
        archive.writestr("detectron2/_C.cpython-310-x86_64-linux-gnu.so", "operators")
        archive.writestr("tools/__init__.py", "")
        archive.writestr("tools/x.py", "")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n"
            "Requires-Dist: tqdm>4.29.0\nRequires-Dist: numpy<2\nRequires-Dist: black\n"
            'Provides-Extra: dev\nRequires-Dist: black==23.3.0; extra == "dev"\n',
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n",
        )
        archive.writestr(f"{info}/top_level.txt", "detectron2\ntools\nwheels\n")
        archive.writestr(f"{info}/RECORD", "tools/x.py,,\ndetectron2/__init__.py,,\n")
    return path


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return folder


def install(installer, wheel, target):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return installer.main(["--wheel", str(wheel)], target=target, sha256=sha256)


def files_below(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def make(*arguments, cwd=ROOT):
    # This make must not inherit settings from an outer `make test`.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


# ---- tools/install_detectron2.py


def test_a_detectron2_that_can_be_imported_is_kept(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "9.9"\n')
    before = files_below(tmp_path)
    run = subprocess.run(
        [sys.executable, SCRIPT, "--wheel", "not-there.whl"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert f"9.9 in {package}" in run.stdout
    assert files_below(tmp_path) == before


def test_a_folder_named_detectron2_does_not_count_as_installed(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "detectron2").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    assert module.find_installed() is None


def test_only_the_package_and_its_metadata_are_installed(installer, wheel, target):
    assert install(installer, wheel, target) == 0
    assert {p.name for p in target.iterdir()} == {"detectron2", "sal_detectron2-0.7.2.dist-info"}
    assert not list(target.rglob("_C.*"))


def test_the_metadata_matches_the_installed_files(installer, wheel, target):
    install(installer, wheel, target)
    (found,) = importlib.metadata.distributions(path=[str(target)])
    assert found.requires == ["tqdm>4.29.0", "numpy", 'black==23.3.0; extra == "dev"']
    assert found.read_text("top_level.txt") == "detectron2\n"
    assert "Tag: py3-none-any\n" in found.read_text("WHEEL")
    # `pip uninstall` removes the files that RECORD lists.
    assert {str(path) for path in found.files} == files_below(target)
    for path in found.files:
        if path.hash:
            digest = hashlib.new(path.hash.mode, path.locate().read_bytes()).digest()
            assert path.hash.value == urlsafe_b64encode(digest).decode().rstrip("=")


def test_a_wheel_with_a_wrong_hash_is_rejected(installer, wheel, target, capsys):
    assert installer.main(["--wheel", str(wheel)], target=target) == 1
    message = capsys.readouterr().err
    assert installer.SHA256 in message
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in message
    assert not list(target.iterdir())


def test_a_missing_wheel_is_named(installer, target, capsys):
    assert installer.main(["--wheel", "not-there.whl"], target=target) == 1
    assert "not-there.whl" in capsys.readouterr().err


def test_a_failed_download_names_the_other_ways(installer, target, capsys, monkeypatch):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "ERROR: No matching distribution found\n")

    monkeypatch.setattr(installer.subprocess, "run", no_network)
    assert installer.main([], target=target) == 1
    message = capsys.readouterr().err
    assert "No matching distribution found" in message
    assert "--wheel FILE" in message
    assert "https://github.com/facebookresearch/detectron2" in message
    assert not list(target.iterdir())


def test_the_operating_systems_python_is_rejected(
    installer, wheel, target, capsys, monkeypatch, tmp_path
):
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(installer.sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(installer.sysconfig, "get_path", lambda name: str(tmp_path))
    assert install(installer, wheel, target) == 1
    assert "make setup" in capsys.readouterr().err
    assert not list(target.iterdir())


@pytest.mark.parametrize("renames", [0, 1], ids=["before metadata", "between metadata and package"])
def test_an_interrupted_installation_leaves_nothing(installer, wheel, target, monkeypatch, renames):
    done = []
    real_rename = os.rename

    def rename(source, goal):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(real_rename(source, goal))

    monkeypatch.setattr(installer.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        install(installer, wheel, target)
    assert not list(target.iterdir())


def test_leftovers_of_a_killed_installation_are_removed_by_the_next(installer, wheel, target):
    staging = target / f"{installer.STAGING_PREFIX}abc"
    (staging / "detectron2").mkdir(parents=True)
    info = target / "sal_detectron2-0.7.2.dist-info"
    info.mkdir()
    (info / "stale").touch()
    assert install(installer, wheel, target) == 0
    assert not staging.exists()
    assert not (info / "stale").exists()
    assert (target / "detectron2" / "__init__.py").exists()


def test_a_conflicting_folder_is_reported(installer, wheel, target, capsys):
    (target / "detectron2" / "rest").mkdir(parents=True)
    assert install(installer, wheel, target) == 1
    assert str(target) in capsys.readouterr().err
    assert {p.name for p in target.iterdir()} == {"detectron2"}


# ---- constraints.txt


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def direct_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(r) for r in sum(extras, project["dependencies"])]


def test_constraints_are_exact():
    inexact = {n: s for n, s in pins().items() if not re.fullmatch(r"==[^*,]+", s)}
    assert not inexact


def test_every_dependency_is_pinned_to_a_version_it_allows():
    pinned = pins()
    for requirement in direct_requirements():
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is in pyproject.toml but not in constraints.txt"
        assert requirement.specifier.contains(pin.removeprefix("=="), prereleases=True), requirement


@pytest.mark.long
def test_transitive_dependencies_are_pinned_too():
    pinned = pins()
    todo = [(canonicalize_name(r.name), "") for r in direct_requirements()]
    seen = set()
    while todo:
        name, extra = todo.pop()
        # Other torch builds may depend on different CUDA packages.
        if (name, extra) in seen or name.startswith(("cuda", "nvidia", "triton")):
            continue
        seen.add((name, extra))
        assert name in pinned, f"{name} is installed as a dependency but not in constraints.txt"
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                child = canonicalize_name(requirement.name)
                todo += [(child, e) for e in ("", *requirement.extras)]


# ---- Makefile and .ci/run


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("setup", "tools/install_detectron2.py"),
        ("demo", "--config-file configs/demo_faster_rcnn_se_r18.yaml"),
        ("demo", "tools/report.py output/demo"),
        ("demo-instant", "--config-file configs/instant/demo_faster_rcnn_se_r18.yaml"),
        ("test", 'pytest -n 2 --dist worksteal -m "not slow and not faults"'),
        ("test-fast", '-m "not slow and not faults and not long"'),
        ("test-narrow", "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1"),
        ("test-faults", "pytest -n 2 --dist worksteal -m faults"),
        ("test-slow", "pytest -n 2"),
        ("test-gpu", "pytest -m gpu -rs"),
        ("coverage", "--cov --cov-report=term --cov-report=xml"),
        ("lint", "ruff format --check"),
        ("lint", "codespell_lib"),
    ],
)
def test_make_has_the_documented_targets(target, command):
    # --always-make makes `make` behave as on a new machine without installed packages.
    run = make("--dry-run", "--always-make", target)
    assert run.returncode == 0, run.stderr
    assert "pip install" in run.stdout
    assert command in run.stdout
    assert f"make {target} " in make("help").stdout


@pytest.fixture
def clone(tmp_path):
    """Copy the files that `make setup` reads before it installs anything, as in a fresh clone."""
    folder = tmp_path / "clone"
    (folder / "tools").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/install_detectron2.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def fake_python(folder, script):
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_without_a_suitable_python_make_reports_what_to_install(clone):
    old = fake_python(clone, "exit 1")  # the check for Python 3.11 to 3.13 fails
    run = make("setup", f"PYTHON={old}", cwd=clone)
    assert run.returncode != 0
    assert "3.11 to 3.13" in run.stderr
    assert "python3-venv" in run.stderr
    assert str(old) in run.stderr


def test_without_the_venv_module_make_names_its_debian_package(clone):
    script = f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac'
    run = make("setup", f"PYTHON={fake_python(clone, script)}", cwd=clone)
    assert run.returncode != 0
    assert f"python3.{sys.version_info.minor}-venv" in run.stderr


def test_a_finished_setup_is_not_done_again(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".ready").touch()
    run = make("setup", cwd=clone)
    assert run.returncode == 0, run.stderr
    assert "pip" not in run.stdout


def test_ci_script_is_valid_bash():
    run = subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
