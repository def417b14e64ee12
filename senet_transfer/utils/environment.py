"""Versions and hardware, for the records of runs and for bug reports."""

import sys
from importlib import metadata

from detectron2.utils.collect_env import collect_env_info

_PACKAGES = (
    "senet_transfer", "torch", "torchvision", "numpy", "pillow", "fvcore", "iopath",
    "pycocotools", "opencv-python-headless", "omegaconf", "yacs",
)  # fmt: skip


def environment_report() -> str:
    """Return the current command, the versions of packages and a description of the machine.

    The description is that of Detectron2: Python, compilers, CUDA, GPUs and PyTorch's build.
    """
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name}: not installed")
    return "\n\n".join([" ".join(sys.argv), "\n".join(versions), collect_env_info()]) + "\n"
