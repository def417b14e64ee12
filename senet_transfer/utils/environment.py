"""Collection of software versions and hardware details for run records and bug reports."""

import contextlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.collect_env import collect_env_info

_PACKAGES = (
    "senet_transfer", "torch", "torchvision", "numpy", "pillow", "fvcore", "iopath",
    "pycocotools", "opencv-python-headless", "omegaconf", "yacs",
)  # fmt: skip


def environment_report() -> str:
    """Return the current command, package versions and a description of the machine.

    The description is Detectron2's environment report, which lists the versions of Python, CUDA and
    compilers, the GPUs, and PyTorch's build settings.
    """
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name}: not installed")
    return "\n\n".join([" ".join(sys.argv), "\n".join(versions), collect_env_info()]) + "\n"


def origin(*, on_gpu: bool = True) -> dict[str, Any]:
    """Return a description of the machine and the code's commit, for the record of a run.

    The commit ends with "-dirty" if a tracked file differs from the commit. Files in ``docs`` and
    ``results`` are ignored, because writing a run's record and figures changes them.

    Args:
        on_gpu: Whether the run uses a GPU if one is available.
    """
    return {"machine": _machine(on_gpu and torch.cuda.is_available()), "commit": _commit()}


def _machine(on_gpu: bool) -> dict[str, Any]:
    if on_gpu:
        device = torch.cuda.get_device_name()
    else:
        text = Path("/proc/cpuinfo").read_text()
        names = re.findall(r"^model name\s*: (.*)$", text, re.M)
        device = names[0] if names else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return {"device": device, "cores": cores, "torch": torch.__version__}


def _commit() -> str:
    """Return the commit of the Git clone; without a clone, ``$GIT_COMMIT`` or "unknown"."""
    root = Path(__file__).parents[2]
    # Git also searches the parent folders, which may belong to a user's repository if this package
    # is installed.
    if Path(root, ".git").exists():
        # An error means that git is not installed or does not trust the owner of the folder.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            changed = _git(root, "diff", "--name-only", "HEAD", "--", ".", ":!docs", ":!results")
            return _git(root, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    return os.environ.get("GIT_COMMIT", "unknown")


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
