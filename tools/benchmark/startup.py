"""The part ``startup``: how long it takes until something can begin."""

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
    """Fresh processes: what torch and Detectron2's models take alone, and what comes on top."""
    yield compare(
        "Start of a process",
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
