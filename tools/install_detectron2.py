"""Install Detectron2 into the environment of the Python that runs this: `make setup` does.

    python tools/install_detectron2.py                # from the package index
    python tools/install_detectron2.py --wheel FILE   # from a file brought along

Any Detectron2 that can be imported already, such as a build of the official source, is kept.

Detectron2 is not on the package index under its own name. The wheel `sal-detectron2` is the
official source of April 2024 (commit a59f05630), built for Python 3.10. Its Python code runs on
later versions; its compiled operators do not, and nothing in this project needs them. Four
things in the wheel would do harm, and are left out or put right:

- a top-level package `tools`, which would shadow other people's;
- the operators compiled for Python 3.10;
- the requirement numpy<2, which its code does not have, and black, which only one method of its
  lazy configs imports: pip would complain about both at every later installation;
- the tag of Python 3.10, for the same reason.
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
What to do, one of:
  - With the package index in reach (a proxy or mirror is pip's own configuration), run this again.
  - Fetch the wheel on another machine, bring the file here, and name it:
        pip download {" ".join(PIP_OPTIONS)} sal-detectron2=={VERSION}
        {sys.executable} tools/install_detectron2.py --wheel FILE
  - Build the official source (needs a C++ compiler, and torch installed first):
        {sys.executable} -m pip install --no-build-isolation \\
            git+https://github.com/facebookresearch/detectron2
"""


class InstallError(Exception):
    """Detectron2 cannot be installed; the message says what was tried and found."""


def find_installed() -> str | None:
    """Version and folder of the Detectron2 that `import detectron2` finds, if it finds one."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # no origin: a mere folder of that name
        return None
    # Read, not imported: importing it takes torch, and seconds.
    source = Path(spec.origin).read_text(encoding="utf-8")
    version = re.search(r"^__version__ = [\"'](.+?)[\"']", source, re.MULTILINE)
    return f"{version[1] if version else '(unknown version)'} in {Path(spec.origin).parent}"


def check_environment() -> None:
    """Refuse the operating system's own Python, as pip does."""
    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix == sys.base_prefix and marker.exists():
        raise InstallError(
            f"{sys.executable} belongs to the operating system.\nUse a virtual environment's "
            "python instead: `make setup` makes one, in .venv."
        )


def download(folder: Path) -> Path:
    """Have pip fetch the wheel, pinned by hash, into `folder`."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"sal-detectron2=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--require-hashes"]
    command += ["--retries", "2", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    print(f"Fetching Detectron2 (sal-detectron2 {VERSION}, 7 MB) ...", flush=True)
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        said = "\n".join(f"    {line}" for line in pip.stdout.strip().splitlines()[-6:])
        raise InstallError(f"Tried: {' '.join(command)}\nIt failed; its last words:\n{said}")
    return wheels[0]


def check_hash(wheel: Path, expected: str) -> None:
    """Refuse a missing file, and one other than the wheel that the tests passed with."""
    if not wheel.is_file():
        raise InstallError(f"Tried: the wheel {wheel}\nThere is no such file.")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"Tried: the wheel {wheel}\nExpected sal-detectron2 {VERSION}, sha256 {expected},\n"
            f"found sha256 {found}: another release, or a damaged file."
        )


def unpack(wheel: Path, staging: Path) -> Path:
    """Lay out in `staging` what shall be installed; returns its `.dist-info` folder."""
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
    """List every file below `root` with hash and size, as `pip uninstall` needs it."""
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
    """Install the package of `wheel` into `target`: all of it or, if interrupted, nothing.

    Everything is prepared in a folder beside the goal, then renamed into place. The package goes
    last, so that wherever it can be imported, it is complete.
    """
    for leftover in target.glob(f"{STAGING_PREFIX}*"):  # of a run that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=target) as staging:
        info = unpack(wheel, Path(staging))
        goal = target / info.name
        if goal.exists():  # of a run killed before the package followed
            shutil.rmtree(goal)
        try:
            os.rename(info, goal)
            os.rename(Path(staging, "detectron2"), target / "detectron2")
        except BaseException:
            shutil.rmtree(goal, ignore_errors=True)
            raise


def main(argv: list[str] | None = None, target: Path | None = None, sha256: str = SHA256) -> int:
    parser = argparse.ArgumentParser(description="Install Detectron2 unless it is there already.")
    parser.add_argument("--wheel", type=Path, help=f"a local file of sal-detectron2 {VERSION}")
    args = parser.parse_args(argv)
    if there := find_installed():
        print(f"Detectron2 is there already and is kept: {there}")
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
            f"Detectron2 is not installed: {error}\nThis Python's packages are in {target}. Make "
            "sure that you may write there, or use a virtual environment (`make setup` makes "
            "one).\nA folder named detectron2 there that cannot be imported has to be removed.",
            file=sys.stderr,
        )
        return 1
    print(f"Installed Detectron2 (sal-detectron2 {VERSION}) in {target / 'detectron2'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
