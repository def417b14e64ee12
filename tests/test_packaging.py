"""Tests for the wheel and the source distribution: contents, version, commands and configs."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import senet_transfer
from senet_transfer import UserError
from senet_transfer.config.load import find_config, load_config
from senet_transfer.engine.publish.bundle import bundle
from tests.engine.predictor.conftest import CLASSES, saved

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("senet", "senet-train", "senet-predict", "senet-eval-places365")
# Programs that run without this package's dependencies.
PROGRAMS = ("install_detectron2.py", "classify_onnx.py", "detect_onnx.py", "onnx_images.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Copy the files that a wheel or source distribution is built from, and return the folder."""
    root = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    for name in ("senet_transfer", "configs"):
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=hidden)
    (root / "tools").mkdir()
    for name in PROGRAMS:
        shutil.copy(ROOT / "tools" / name, root / "tools" / name)
    return root


def build_wheel(source: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(target)]
    done = subprocess.run([*command, "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Build a wheel from the copied source and return the wheel's path."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.mark.long
def test_a_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    rebuilt = build_wheel(tmp_path / path.name.removesuffix(".tar.gz"), tmp_path)
    with zipfile.ZipFile(wheel) as expected, zipfile.ZipFile(rebuilt) as found:
        assert set(found.namelist()) == set(expected.namelist())


@pytest.mark.long
def test_the_version_is_stated_once_and_used_by_every_package(wheel):
    version = senet_transfer.__version__
    assert wheel.name.startswith(f"senet_transfer-{version}-")
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version


def _run(code: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_without_detectron2_the_error_names_a_program_in_the_wheel():
    start = "import sys; sys.modules['detectron2'] = None; "
    program = "from senet_transfer.cli.main import command; sys.argv[1:] = {}; command()"
    codes = {
        "import senet_transfer; senet_transfer.load": (1, "ImportError: senet_transfer requires"),
        program.format(["report", "output"]): (2, "error: senet_transfer requires Detectron2"),
        program.format(["train"]): (2, "error: senet_transfer requires Detectron2"),
    }
    for code, (status, words) in codes.items():
        done = _run(start + code)
        assert done.returncode == status
        assert words in done.stderr
        assert f"Run `{PROGRAMS[0]}`" in done.stderr
        assert ("Traceback" in done.stderr) == (status == 1)
    done = _run(start + program.format(["--version"]))
    assert done.returncode == 0, done.stderr


def test_senet_prints_its_version_without_torch():
    code = """
import sys
from senet_transfer.cli.main import command
sys.argv = ["senet", "--version"]
try:
    command()
finally:
    assert not {"torch", "detectron2", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"senet {senet_transfer.__version__}\n"


@pytest.mark.long
def test_a_wheel_holds_every_module_config_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for path in (ROOT / "configs").rglob("*.yaml"):
            name = f"senet_transfer/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
            assert archive.read(name) == path.read_bytes()
        (entries,) = (name for name in names if name.endswith("entry_points.txt"))
        assert all(f"{command} = " in archive.read(entries).decode() for command in COMMANDS)
        scripts = {Path(name).name for name in names if ".data/scripts/" in name}
    assert scripts == set(PROGRAMS)
    assert "senet_transfer/py.typed" in names
    for path in (ROOT / "senet_transfer").rglob("*"):
        if path.suffix in (".py", ".yaml", ".html", ".css", ".js", ".safetensors", ".md"):
            assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.startswith(("tests", "tools", "configs"))]
    assert not [name for name in names if "benchmark" in name]


@pytest.mark.long
def test_the_documented_commands_can_be_called():
    # Check the entry points in pyproject.toml, because the installed ones can be out of date.
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == set(COMMANDS)
    for name, target in scripts.items():
        entry = importlib.metadata.EntryPoint(name, target, "console_scripts")
        assert callable(entry.load())


@pytest.mark.parametrize(
    "name",
    ["faster_rcnn_se_r50", "configs/faster_rcnn_se_r50.yaml", "instant/faster_rcnn_se_r50"],
)
def test_a_config_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).MODEL.SE.ENABLED is True
    # A user's file with this name takes precedence.
    own = tmp_path / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("SEED: 123\n")
    assert load_config(name).SEED == 123


def test_a_missing_config_is_an_error_that_suggests_similar_names():
    with pytest.raises(UserError, match="no config file faster_rcn_se_r50.*faster_rcnn_se_r50"):
        find_config("faster_rcn_se_r50")


@pytest.mark.slow
def test_weights_in_an_installed_wheel_load_by_name_without_network(source, tmp_path):
    run = tmp_path / "run"
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": "3", "MODEL.DEVICE": "cpu"}
    saved("configs/cifar10_se_resnet20.yaml", options, run)
    copied = tmp_path / "source"
    shutil.copytree(source, copied, symlinks=True)
    pretrained = copied / "senet_transfer" / "pretrained"
    bundle(run, "senet_transfer/scenes", pretrained, half=True)
    with zipfile.ZipFile(build_wheel(copied, tmp_path)) as archive:
        archive.extractall(tmp_path / "installed")
    code = """
import socket

def refuse(*_):
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
import numpy, senet_transfer
print(senet_transfer.__file__, senet_transfer.list_catalogue("senet_transfer/scenes"))
found = senet_transfer.load("senet_transfer/scenes")(numpy.zeros((40, 50, 3), numpy.uint8))
print(sorted(found.names))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "installed") in done.stdout
    assert "['senet_transfer/scenes']" in done.stdout
    assert str(CLASSES) in done.stdout


@pytest.mark.slow
def test_an_installed_wheel_trains_evaluates_and_predicts_outside_the_clone(
    wheel, tmp_path, shared_data
):
    place, home = tmp_path / "installed", tmp_path / "home"
    home.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    data = shared_data / "coco128"
    (json_file,) = data.glob("**/*.json")
    (images,) = {path.parent for path in data.glob("**/*.jpg")}

    def call(command, *words):
        line = [sys.executable, place / "bin" / command, *words]
        done = subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    own = ["--dataset", "own", str(json_file), str(images), "DATASETS.TRAIN", "('own',)"]
    small = ["DATASETS.TEST", "('own',)", "MODEL.WEIGHTS", "", "OUTPUT_DIR", "run"]
    call("senet-train", "--config-file", "instant/faster_rcnn_se_r50", *own, *small)
    words = ["--input", str(next(images.glob("*.jpg"))), "--output", "found"]
    said = call("senet-predict", "--weights", "run/model_final.pth", *words)
    assert "1 image: drawings written to found" in said
    assert "Table VI" in call("senet-eval-places365", "--help")
    assert "detections.json" in call("detect_onnx.py", "--help")
