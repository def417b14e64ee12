#!/usr/bin/env python
"""Install Detectron2 into the current Python environment (used by `make setup`).

    python tools/install_detectron2.py                # from the package index
    python tools/install_detectron2.py --wheel FILE   # from a local file

This project's wheel installs this script as the command `install_detectron2.py`.

If Detectron2 can already be imported, for example because it was built from source, it is kept.

The package index has no package called detectron2. The wheel `sal-detectron2` contains the official
source of April 2024 (commit a59f05630), built for Python 3.10. Its Python code also runs on later
Python versions. Its compiled operators do not, but this project doesn't need them. Four parts of
the wheel would cause problems and are removed or corrected:

- the top-level package `tools`, which would shadow other packages called tools;
- the operators compiled for Python 3.10;
- the requirements numpy<2, which the code doesn't need, and black, which is imported by only one
  method of the lazy configs: pip would report both as conflicts in every later installation;
- the tag for Python 3.10: on later versions, `pip check` would report an unsupported package.
"""

import argparse
import base64
import csv
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
PIP_OPTIONS = ["--no-deps", "--only-binary=:all:", "--python-version", "3.10"]
STAGING_PREFIX = ".detectron2-incoming-"

HELP = f"""
To install Detectron2, do one of the following:
  - Run this script again with access to the package index (configure a proxy or mirror in pip).
  - Download the wheel on another machine, copy it to this machine, and install it:
        pip download {" ".join(PIP_OPTIONS)} sal-detectron2=={VERSION}
        {sys.executable} {sys.argv[0]} --wheel FILE
  - Build Detectron2 from source (this requires a C++ compiler and an existing torch installation):
        {sys.executable} -m pip install --no-build-isolation \\
            git+https://github.com/facebookresearch/detectron2
"""


class InstallError(Exception):
    """Error raised if Detectron2 can't be installed."""


def find_installed() -> str | None:
    """Return the version and folder of Detectron2, or None if it isn't installed."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # An ordinary folder called detectron2 has no origin.
        return None
    # Read the file because importing it requires torch and takes seconds.
    source = Path(spec.origin).read_text(encoding="utf-8")
    version = re.search(r"^__version__ = [\"'](.+?)[\"']", source, re.MULTILINE)
    return f"{version[1] if version else '(unknown version)'} in {Path(spec.origin).parent}"


def check_environment() -> None:
    """Raise an error, as pip does, if Python is managed by the operating system."""
    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix == sys.base_prefix and marker.exists():
        raise InstallError(
            f"{sys.executable} is managed by the operating system.\nUse Python in a virtual "
            "environment. `make setup` creates one in .venv."
        )


def download(folder: Path) -> Path:
    """Download the wheel into `folder` with pip, and verify its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"sal-detectron2=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--require-hashes"]
    command += ["--retries", "2", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    print(f"Downloading Detectron2 (sal-detectron2 {VERSION}, 7 MB) ...", flush=True)
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        said = "\n".join(f"    {line}" for line in pip.stdout.strip().splitlines()[-6:])
        raise InstallError(
            f"This command failed to download the wheel:\n    {' '.join(command)}\n"
            f"The last lines of its output are:\n{said}"
        )
    return wheels[0]


def check_hash(wheel: Path, expected: str) -> None:
    """Raise an error if the file is missing or is not the tested wheel."""
    if not wheel.is_file():
        raise InstallError(f"The wheel {wheel} does not exist. Check the path after --wheel.")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"The wheel {wheel} has the SHA-256 hash\n{found}; expected sal-detectron2 {VERSION} "
            f"with the hash\n{expected}. The file is a different release or is corrupted."
        )


def unpack(wheel: Path, staging: Path) -> Path:
    """Extract the required files into `staging`, and return the `.dist-info` folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            top = name.partition("/")[0]
            is_operator = re.fullmatch(r"detectron2/_C\..*\.so", name)
            if (top == "detectron2" or top.endswith(".dist-info")) and not is_operator:
                archive.extract(name, staging)
    (info,) = staging.glob("*.dist-info")

    metadata = (info / "METADATA").read_text(encoding="utf-8")
    metadata = metadata.replace("\nRequires-Dist: numpy<2\n", "\nRequires-Dist: numpy\n")
    metadata = metadata.replace("\nRequires-Dist: black\n", "\n")
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    wheel_tags = (info / "WHEEL").read_text(encoding="utf-8")
    wheel_tags = re.sub(r"(?m)^Root-Is-Purelib: .*$", "Root-Is-Purelib: true", wheel_tags)
    wheel_tags = re.sub(r"(?m)^Tag: .*$", "Tag: py3-none-any", wheel_tags)
    (info / "WHEEL").write_text(wheel_tags, encoding="utf-8")
    (info / "top_level.txt").write_text("detectron2\n")
    (info / "INSTALLER").write_text("tools/install_detectron2.py\n")
    write_record(staging, info / "RECORD")
    return info


def write_record(root: Path, record: Path) -> None:
    """Write the RECORD file, which lists all files in `root` for `pip uninstall`."""
    record.unlink(missing_ok=True)
    rows = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        content = path.read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append([path.relative_to(root).as_posix(), f"sha256={digest}", len(content)])
    rows.append([record.relative_to(root).as_posix(), "", ""])
    with record.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def install(wheel: Path, target: Path) -> None:
    """Install the package in `wheel` into `target` atomically.

    All files are extracted to a temporary folder in `target` and then moved. The package is moved
    last, so that it can only be imported when it is complete.
    """
    for leftover in target.glob(f"{STAGING_PREFIX}*"):  # Left by a killed process.
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=target) as staging:
        info = unpack(wheel, Path(staging))
        goal = target / info.name
        if goal.exists():  # Left by a process that was killed before it moved the package.
            shutil.rmtree(goal)
        try:
            os.rename(info, goal)
            os.rename(Path(staging, "detectron2"), target / "detectron2")
        except BaseException:
            shutil.rmtree(goal, ignore_errors=True)
            raise


def main(argv: list[str] | None = None, target: Path | None = None, sha256: str = SHA256) -> int:
    parser = argparse.ArgumentParser(
        description="Install Detectron2 unless it is already installed."
    )
    parser.add_argument("--wheel", type=Path, help=f"a local wheel of sal-detectron2 {VERSION}")
    args = parser.parse_args(argv)
    if there := find_installed():
        print(f"Detectron2 is already installed: {there}")
        return 0
    target = target or Path(sysconfig.get_path("purelib"))
    try:
        check_environment()
        with tempfile.TemporaryDirectory() as folder:
            wheel = args.wheel or download(Path(folder))
            check_hash(wheel, sha256)
            install(wheel, target)
    except InstallError as error:
        print(f"Detectron2 is not installed.\n{error}\n{HELP}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"Detectron2 is not installed: {error}\nPython packages are installed in {target}. "
            "Make sure that this folder is writable, or use a virtual environment (`make setup` "
            "creates one).\nIf the folder contains a detectron2 package that can't be "
            "imported, remove it.",
            file=sys.stderr,
        )
        return 1
    print(f"Installed Detectron2 (sal-detectron2 {VERSION}) in {target / 'detectron2'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
