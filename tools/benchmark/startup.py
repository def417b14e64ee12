"""Benchmark ``startup``: import times and start-up times."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmark.compare import compare
from benchmark.networks import Options
from benchmark.report import Row

ROOT = Path(__file__).resolve().parents[2]


def _python(*arguments: str) -> Callable[[], object]:
    command = [sys.executable, "-W", "ignore", *arguments]
    return lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def measure_startup(options: Options) -> Iterator[Row]:
    """Time imports in new processes: torch, Detectron2, this package and a command."""
    yield compare(
        "Process start-up",
        {
            "import torch": _python("-c", "import torch"),
            "import detectron2.modeling": _python("-c", "import detectron2.modeling"),
            "again": _python("-c", "import detectron2.modeling"),
            "import senet_transfer": _python("-c", "import senet_transfer"),
            "train_net.py --help": _python("tools/train_net.py", "--help"),
        },
        baseline="import detectron2.modeling",
        control="again",
        seconds=0,
        min_rounds=6,
        warm_up=0,
    )
