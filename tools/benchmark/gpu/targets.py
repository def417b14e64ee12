"""Target values of the GPU benchmark, and their comparison with measurements."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A target for one measured value.

    Attributes:
        what: Description of the value.
        bound: Maximum accepted value, or minimum if ``at_least`` is True.
        at_least: True if larger values are better.
    """

    what: str
    bound: float
    at_least: bool = False

    @property
    def text(self) -> str:
        """The bound in words, such as "at most 1.1"."""
        return f"at {'least' if self.at_least else 'most'} {self.bound:,g}"

    def is_met_by(self, value: float) -> bool:
        """Return whether a value meets the target."""
        return value >= self.bound if self.at_least else value <= self.bound


_STEP = "training step of ResNet-50, 64 x 224x224, bfloat16, channels last"
_FPN = "FPN backbone, frozen norms, 2 x 800x1216, AMP"
_RCNN = "Faster R-CNN R50-FPN, step of 16 images of 800 px, AMP"
_CIFAR = "CIFAR, 128 images per step, bfloat16, engine with SOLVER.COMPILE graph"
_INFERENCE = "inference, 224x224, float16, deployed, as a CUDA graph"

# "Plain" networks use PyTorch's operators only (``fused=False``).
TARGETS = {
    "graph": Target(f"{_STEP}, as a CUDA graph: SE over plain", 1.03),
    "graph_fused": Target(f"{_STEP}, as a CUDA graph: fused plain over plain", 0.95),
    "eager": Target(f"{_STEP}, eager: SE over plain", 1.15),
    "eager_kernels": Target(f"{_STEP}, eager: kernels per step with SE", 1100),
    "eager_timm": Target(f"{_STEP}, eager: SE over timm's seresnet50", 0.80),
    "compiled": Target(f"{_STEP}, compiled: SE over plain", 1.05),
    "memory": Target(f"{_STEP}, peak memory: SE over plain", 1.02),
    "fpn_busy": Target(f"{_FPN}, time that the GPU is busy: SE over plain", 1.05),
    "fpn_kernels": Target(f"{_FPN}, kernels per step with SE", 1250),
    "detector": Target(f"{_RCNN}: SE over plain", 1.06),
    "detector_plain": Target(f"{_RCNN}: plain over Detectron2's own backbone and trainer", 1.0),
    "cifar": Target(f"{_CIFAR}: ResNet-110, images per second", 10_000, at_least=True),
    "cifar_se": Target(f"{_CIFAR}: SE-ResNet-110, images per second", 7_000, at_least=True),
    "inference_1": Target(f"{_INFERENCE}, batch size 1: SE over plain", 1.10),
    "inference_64": Target(f"{_INFERENCE}, batch size 64: SE over plain", 1.05),
    "inference_timm_1": Target(f"{_INFERENCE}, batch size 1: SE over timm's seresnet50", 1.0),
    "inference_timm_64": Target(f"{_INFERENCE}, batch size 64: SE over timm's seresnet50", 1.0),
}


@dataclass(frozen=True)
class Result:
    """A measured value that has a target.

    Attributes:
        value: Measured value.
        spread: Interquartile range, over all rounds, of the control's time divided by the
            baseline's time. The control is a second instance of the baseline. None if there is no
            control, or if the value is not a ratio of times.
    """

    value: float
    spread: float | None = None


def table(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Return a row for each target: the bound, the measured value, and whether the bound is met."""
    rows = []
    for key, target in TARGETS.items():
        row: dict[str, Any] = {"key": key, "what": target.what, "target": target.text}
        result = results.get(key)
        if result is not None and math.isfinite(result.value):
            row |= {"measured": result.value, "met": target.is_met_by(result.value)}
            row["control_spread"] = result.spread
        rows.append(row)
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows of :func:`table` as text, with "not measured" for missing values."""
    lines = ["Targets"]
    for row in rows:
        measured = "not measured"
        if "measured" in row:
            measured = f"{row['measured']:,.4g}  {'met' if row['met'] else 'MISSED'}"
            if row["control_spread"] is not None:
                measured += f"  (spread of the control: {row['control_spread']:.1%})"
        lines.append(f"  {row['what']}\n      target {row['target']}; measured: {measured}")
    return "\n".join(lines)


def as_markdown(rows: list[dict[str, Any]], device: str) -> str:
    """Return the rows of :func:`table` as a Markdown table for the documentation."""
    lines = [f"| measured value | target | {device} |", "|---|---|---|"]
    for row in rows:
        measured = "not measured"
        if "measured" in row:
            value = row["measured"]
            measured = f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
            measured = measured if row["met"] else f"**{measured}, missed**"
        lines.append(f"| {row['what']} | {row['target']} | {measured} |")
    return "\n".join(lines)
