"""Measurements shared by the parts of the GPU benchmark: time, kernels and CUDA graphs."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmark.compare import Comparison, compare, synchronise
from benchmark.gpu.targets import Result
from benchmark.report import Amounts, Row

Step = Callable[[], object]
# A row of the benchmark's report, and the values in this row that have a target.
Found = tuple[Row, dict[str, Result]]


@dataclass(frozen=True)
class Settings:
    """Settings of the GPU benchmark.

    Attributes:
        dry_run: If True, only check the benchmark's code on a CPU, with tiny networks and images.
            The measured values are meaningless.
        compiled: Variants of ResNet-50 to compile and measure. "bf16": with and without SE, in
            bfloat16. "all": also with fused kernels, and timm's seresnet50, each in bfloat16,
            float16 and float32.
        deadline: Value of ``time.monotonic()`` at which this part of the benchmark is stopped.
    """

    dry_run: bool = False
    compiled: str = "bf16"
    deadline: float = math.inf

    @property
    def device(self) -> str:
        """Device on which the networks run."""
        return "cpu" if self.dry_run else "cuda"

    def sized(self, full: Any, tiny: Any) -> Any:
        """Return a benchmark setting: ``full``, or ``tiny`` in a dry run."""
        return tiny if self.dry_run else full

    def left(self) -> float:
        """Return the number of seconds until the deadline."""
        return self.deadline - time.monotonic()


def timed(calls: int) -> Callable[[Step], float]:
    """Return a timer that calls a step several times and returns the seconds per call."""

    def seconds(step: Step) -> float:
        gc.collect(1)
        gc.disable()
        synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        synchronise()
        found = (time.perf_counter() - start) / calls
        gc.enable()
        return found

    return seconds


def compare_steps(
    settings: Settings,
    what: str,
    steps: Mapping[str, Step],
    *,
    seconds: float,
    calls: int = 1,
    min_rounds: int = 11,
    pairs: list[tuple[str, str]] | None = None,
    timer: Callable[[Step], float] | None = None,
) -> Comparison:
    """Compare the run times of steps with that of the baseline, the step named "plain".

    In each round, every step is timed once. The optional step named "plain again" is a second
    instance of the baseline and serves as the control.
    """
    return compare(
        what,
        steps,
        baseline="plain",
        control="plain again" if "plain again" in steps else None,
        seconds=settings.sized(min(seconds, max(settings.left(), 0)), 0),
        warm_up=settings.sized(3, 0),
        min_rounds=settings.sized(min_rounds, 2),
        pairs=[pair for pair in pairs or [] if set(pair) <= set(steps)],
        timer=timer or timed(settings.sized(calls, 1)),
    )


def ratio_of(found: Comparison, name: str, over: str | None = None) -> Result:
    """Compute the ratio of two candidates' times.

    Args:
        found: The measured times.
        name: The candidate in the numerator.
        over: The candidate in the denominator; None for the baseline.

    Returns:
        The ratio, and the interquartile range of the ratios of the control to the baseline.
    """
    spread = None
    if found.control is not None:
        pairs = zip(found.seconds[found.control], found.seconds[found.baseline], strict=True)
        low, _, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        spread = high - low
    return Result(found.ratio(name, over).value, spread)


def quotient(values: Mapping[str, float], name: str, over: str) -> Result:
    """Return the ratio of two candidates' values; NaN if the denominator is 0, as in a dry run."""
    return Result(values[name] / values[over] if values[over] else math.nan)


def amounts(what: str, unit: str, values: Mapping[str, float]) -> Amounts:
    """Return the values as quantities for the report, with ratios to the network named "plain".

    Args:
        what: Description of the quantity.
        unit: Unit, such as "MB".
        values: Value for each network.
    """
    return Amounts(what, unit, "plain", values)


def host_milliseconds(step: Step) -> float:
    """Return the host time in ms for launching a step's kernels (minimum of three calls)."""
    found = []
    for _ in range(3 if torch.cuda.is_available() else 1):
        synchronise()
        start = time.perf_counter()
        step()
        found.append(1000 * (time.perf_counter() - start))
    synchronise()
    return min(found)


def kernels_of(step: Step, calls: int = 3) -> tuple[float, int]:
    """Return the total kernel time in ms and the number of kernels, per call of a step.

    Memory copies and fills count as kernels. Both values are medians over the calls. On a CPU, both
    values are 0.
    """
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + [activity.CUDA] * torch.cuda.is_available()
    busy, counts = [], []
    for _ in range(calls if torch.cuda.is_available() else 1):
        synchronise()
        with torch.profiler.profile(activities=activities) as profile:
            step()
            synchronise()
        kernels = [
            event
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
        ]
        busy.append(sum(event.time_range.elapsed_us() for event in kernels) / 1000)
        counts.append(len(kernels))
    return statistics.median(busy), int(statistics.median(counts))


def captured(step: Step) -> Step:
    """Return a function that replays a step as a CUDA graph. On a CPU, return the step itself.

    The step must allocate the gradients, and the weight cache of autocast must be disabled.
    """
    if not torch.cuda.is_available():
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def autocast(settings: Settings, dtype: torch.dtype | None, *, cache: bool) -> torch.autocast:
    """Return an autocast context, disabled if ``dtype`` is None or in a dry run."""
    dtype = settings.sized(dtype, None)
    return torch.autocast(
        settings.device, dtype=dtype, enabled=dtype is not None, cache_enabled=cache
    )


def keep_finite(model: nn.Module) -> nn.Module:
    """Scale the last norm in each residual block to keep outputs finite with random weights."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("conv3.norm.weight"):
            nn.init.constant_(tensor, 0.2)
    return model


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Return a model's trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
