#!/usr/bin/env python
"""Pack the GPU benchmark and the GPU tests into an archive for a machine without internet access.

    python tools/benchmark/gpu_archive.py --output output/gpu_benchmark.tar.gz

The archive contains the committed files of the project and packages that PyTorch environments
usually lack. It runs on Linux (x86-64) with Python 3.12, torch 2.11 or later, torchvision, the
packages listed in PROVIDED, and one GPU:

    mkdir gpu && tar xf gpu_benchmark.tar.gz -C gpu && bash gpu/run.sh RESULTS
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Collection, Iterator
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
RUN = Path(__file__).with_name("gpu_archive_run.sh")
PYTHON = "3.12"
LIMIT = 45_000_000  # bytes

# Packages in the archive, in the versions of constraints.txt.
PACKED = (
    "antlr4-python3-runtime", "braceexpand", "defusedxml", "execnet", "faster-coco-eval", "fsspec",
    "fvcore", "hydra-core", "hypothesis", "iniconfig", "iopath", "omegaconf", "pluggy",
    "portalocker", "pycocotools", "pytest", "pytest-xdist", "setuptools", "shapely", "shtab",
    "simplejpeg", "sortedcontainers", "tabulate", "termcolor", "tifffile", "timm", "webdataset",
    "yacs",
)  # fmt: skip
# Packages without published wheels. They are pure Python, so any Python version can build them.
BUILT = ("antlr4-python3-runtime", "fvcore", "iopath")
# Packages that must be installed on the machine, in any version.
PROVIDED = (
    "torch", "torchvision", "triton", "numpy", "pillow", "opencv-python-headless", "protobuf",
    "safetensors", "huggingface-hub", "cloudpickle", "pyyaml", "packaging", "matplotlib",
    "tensorboard", "tqdm", "jinja2", "aiohttp", "pygments", "typing-extensions",
)  # fmt: skip

# Platform tags of binary wheels that the machine supports, in order of preference.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 5)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64"]


class PackError(Exception):
    """Error raised if the archive can't be created."""


def pins() -> dict[str, str]:
    """Return the versions in constraints.txt, keyed by normalised package name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PackError(f"{' '.join(command)}\nfailed with:\n{done.stdout}{done.stderr}")


def fetch_wheels(folder: Path) -> None:
    """Download or build the wheels of all packages, including Detectron2, with pip."""
    versions = pins()
    words = {name: f"{name}=={versions[canonicalize_name(name)]}" for name in PACKED}
    _pip("wheel", "--no-deps", "-q", "-w", str(folder), *(words[name] for name in BUILT))
    target = ["--python-version", PYTHON, "--implementation", "cp"]
    target += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    others = [word for name, word in words.items() if name not in BUILT]
    _pip("download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(folder), *target, *others)
    sys.path.insert(0, str(ROOT / "tools"))
    import install_detectron2

    detectron2 = folder.parent / "detectron2"
    detectron2.mkdir()
    install_detectron2.download(detectron2)


def check_wheels(folder: Path) -> None:
    """Check that the wheels run on the target machine and that no package is missing.

    Raises:
        PackError: If a wheel is for a different Python version or platform, or a dependency is
            neither in the archive nor listed in PROVIDED.
    """
    wheels = sorted(folder.glob("*.whl"))
    packed = {parse_wheel_filename(wheel.name)[0] for wheel in wheels}
    if missing := {canonicalize_name(name) for name in PACKED} - packed:
        raise PackError(
            f"There is no wheel for {', '.join(sorted(missing))}; expected a wheel for each "
            "package in PACKED. Check these names in PACKED."
        )
    known = packed | {canonicalize_name(name) for name in (*PROVIDED, "sal-detectron2")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {"this project": project}
    for wheel in wheels:
        tags = parse_wheel_filename(wheel.name)[3]
        if not any(_runs(str(tag)) for tag in tags):
            raise PackError(f"{wheel.name} is not for Python {PYTHON} on Linux.")
        wanted[wheel.name] = list(_requirements(wheel))
    problems = [
        f"{name} requires {requirement}"
        for name, requirements in wanted.items()
        for requirement in requirements
        if not _is_known(Requirement(requirement), known)
    ]
    if problems:
        raise PackError(
            f"Some requirements are in neither PACKED nor PROVIDED: {'; '.join(problems)}. Add "
            "each required package to PACKED or PROVIDED."
        )


def _runs(tag: str) -> bool:
    python, abi, platform = tag.split("-", 2)
    minor = int(PYTHON.partition(".")[2])
    if platform != "any" and platform not in _PLATFORMS:
        return False
    if python in ("py3", "py2.py3"):
        return abi == "none"
    found = re.fullmatch(r"(cp|py)3(\d*)", python)
    if found is None:
        return False
    own = int(found[2] or 0)
    return own == minor if abi.startswith("cp") else own <= minor


def _requirements(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        # A wheel may contain copies of other packages, with their own metadata.
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = Parser().parsestr(archive.read(name).decode())
    yield from metadata.get_all("Requires-Dist") or []


def _is_known(requirement: Requirement, known: Collection[str]) -> bool:
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
    environment |= {"platform_system": "Linux", "sys_platform": "linux", "os_name": "posix"}
    if requirement.marker and not requirement.marker.evaluate(environment):
        return True
    return canonicalize_name(requirement.name) in known


def pack(output: Path) -> int:
    """Write the archive, and return its size in bytes.

    Raises:
        PackError: If a package can't be downloaded, or the archive is too large.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wheels").mkdir()
        fetch_wheels(folder / "wheels")
        check_wheels(folder / "wheels")
        project = folder / "project.tar"
        command = ["git", "archive", "--output", str(project), "HEAD"]
        subprocess.run(command, cwd=ROOT, check=True)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        (folder / "COMMIT").write_text(commit)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(output, "w:gz") as archive:
            archive.add(RUN, "run.sh")
            for item in ("COMMIT", "project.tar", "wheels", "detectron2"):
                archive.add(folder / item, item)
    size = output.stat().st_size
    if size > LIMIT:
        raise PackError(f"The size of {output} is {size:,} bytes; expected at most {LIMIT:,}.")
    return size


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "output" / "gpu_benchmark.tar.gz"
    parser.add_argument("--output", type=Path, default=default, help="the archive to write")
    return parser


def main(args: argparse.Namespace) -> None:
    """Pack the archive."""
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    if status.stdout:
        print("Uncommitted changes are not included in the archive.", file=sys.stderr)
    try:
        size = pack(args.output)
    except PackError as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(parser().parse_args())
