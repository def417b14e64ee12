"""Writers of benchmark results as text, and as JSON with a description of the machine."""

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.compare import Comparison


@dataclass(frozen=True)
class Amounts:
    """Quantities with a single value per candidate, such as memory.

    Attributes:
        what: Description of the quantity.
        unit: Unit, such as "MB".
        baseline: Candidate in the denominator of all ratios.
        values: Value for each candidate.
    """

    what: str
    unit: str
    baseline: str
    values: Mapping[str, float]

    def ratio(self, name: str) -> float:
        """Return the ratio of a candidate to the baseline; NaN if the baseline is 0."""
        below = self.values[self.baseline]
        return self.values[name] / below if below else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return the values and ratios as a dict for JSON."""
        rows = {
            name: {"value": value, "ratio": self.ratio(name)} for name, value in self.values.items()
        }
        head = {"what": self.what, "unit": self.unit, "baseline": self.baseline}
        return {**head, "candidates": rows}

    def __str__(self) -> str:
        width = max(len(name) for name in self.values)
        lines = [self.what]
        for name, value in self.values.items():
            text = f"  {name:{width}} {value:10.2f} {self.unit}"
            lines.append(text if name == self.baseline else f"{text}  ratio {self.ratio(name):.3f}")
        return "\n".join(lines)


Row = Comparison | Amounts


def machine() -> dict[str, Any]:
    """Return a description of the machine: processor, cores, threads, GPU and software versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # The file exists only on Linux.
    return platform.processor() or platform.machine()


def write_json(path: str, parts: Mapping[str, list[Row]], command: str) -> None:
    """Write all results to a JSON file."""
    result = {
        "command": command,
        "machine": machine(),
        "parts": {part: [row.as_dict() for row in rows] for part, rows in parts.items()},
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=2) + "\n")
