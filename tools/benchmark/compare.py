"""Paired timing of several functions (candidates), and ratios with 95% confidence intervals.

The speed of a machine can drift by more than the differences to be measured. Therefore, each
candidate is timed once per round, and ratios are computed within each round. Even two instances of
the same network differ in speed because of their memory locations. Therefore, the baseline is built
twice, and the second instance serves as the control. Rounds are added until the confidence interval
of the control's ratio to the baseline is within the tolerance around 1. If this condition is not
met within the time budget, the comparison is reported as unresolved.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

# With 11 rounds, the interval excludes the lowest and highest ratios, which may be outliers.
MIN_ROUNDS = 11


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios in all rounds, with its 95% confidence interval.

    The interval is computed from order statistics. It does not assume a distribution, and outliers
    affect it less than the confidence interval of a mean.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: list[float]) -> "Ratio":
        """Compute the median of ratios and the median's 95% confidence interval.

        For fewer than 6 values, the interval is the full range, and its confidence is below 95%.
        """
        ordered = sorted(ratios)
        skip = _outside(len(ordered))
        return cls(statistics.median(ordered), ordered[skip], ordered[-1 - skip])

    def within(self, tolerance: float) -> bool:
        """Return True if the whole confidence interval is within ``tolerance`` of 1."""
        return abs(self.low - 1) <= tolerance and abs(self.high - 1) <= tolerance

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _outside(count: int) -> int:
    """Return how many values lie below the 95% confidence interval of the median.

    The same number of values lies above the interval.

    Args:
        count: Number of values from which the median is computed.
    """
    tail, skip = 0.0, 0
    while skip < (count - 1) // 2:
        tail += math.comb(count, skip) / 2**count
        if tail > 0.025:
            break
        skip += 1
    return max(0, skip - 1)


@dataclass(frozen=True)
class Comparison:
    """Run times of several functions (candidates) and their ratios to a baseline.

    Attributes:
        what: Description of the comparison.
        baseline: Candidate in the denominator of all ratios.
        seconds: Run times of each candidate in seconds, one value per round.
        control: Candidate that is a second instance of the baseline, or None.
        tolerance: Maximum distance from 1 for the confidence interval of the control's ratio.
        pairs: Pairs of candidates whose ratio (first over second) is also reported.
        notes: Additional entries for the JSON file.
    """

    what: str
    baseline: str
    seconds: Mapping[str, list[float]]
    control: str | None = None
    tolerance: float = 0.01
    pairs: Sequence[tuple[str, str]] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def ratio(self, name: str, over: str | None = None) -> Ratio:
        """Return the ratio of the times of candidate ``name`` to those of ``over``.

        Args:
            name: Candidate in the numerator.
            over: Candidate in the denominator; None for the baseline.
        """
        below = self.seconds[over or self.baseline]
        return Ratio.of([a / b for a, b in zip(self.seconds[name], below, strict=True)])

    @property
    def resolved(self) -> bool:
        """True if the confidence interval of the control's ratio is within the tolerance around 1.

        False if there is no control.
        """
        return self.control is not None and self.ratio(self.control).within(self.tolerance)

    def as_dict(self) -> dict[str, Any]:
        """Return medians and interquartile ranges in seconds, and ratios, as a dict for JSON."""
        rows = {}
        for name, values in self.seconds.items():
            low, _, high = statistics.quantiles(values if len(values) > 1 else 2 * values, n=4)
            rows[name] = {
                "median_s": statistics.median(values),
                "spread_s": high - low,
                "ratio": asdict(self.ratio(name)),
            }
        return {
            "what": self.what,
            "baseline": self.baseline,
            "control": self.control,
            "resolved": self.resolved,
            "rounds": len(self.seconds[self.baseline]),
            "candidates": rows,
            "pairs": [
                {"of": name, "over": over, "ratio": asdict(self.ratio(name, over))}
                for name, over in self.pairs
            ],
            **self.notes,
        }

    def __str__(self) -> str:
        lines = [f"{self.what} ({len(self.seconds[self.baseline])} rounds)"]
        width = max(len(name) for name in self.seconds)
        for name, row in self.as_dict()["candidates"].items():
            median, spread = 1000 * row["median_s"], 1000 * row["spread_s"]
            text = f"  {name:{width}} {median:10.2f} ms  spread {spread:8.2f} ms"
            if name != self.baseline:
                text += f"  ratio {self.ratio(name)}"
            lines.append(text + ("  (control)" if name == self.control else ""))
        for name, over in self.pairs:
            lines.append(f"  {name} over {over}: {self.ratio(name, over)}")
        if self.control and not self.resolved:
            lines.append(f"  unresolved: the control is not within {self.tolerance:.0%} of 1")
        for name, table in self.notes.get("profile", {}).items():
            lines += [f"  {name}:", table]
        return "\n".join(lines)


def compare(
    what: str,
    candidates: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    control: str | None = None,
    seconds: float = 20.0,
    tolerance: float = 0.01,
    warm_up: int = 2,
    min_rounds: int = MIN_ROUNDS,
    pairs: Sequence[tuple[str, str]] = (),
    profile: bool = False,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Comparison:
    """Compare the run times of several functions.

    Args:
        what: The description of the comparison.
        candidates: The functions to time, by name. They take no arguments.
        baseline: The name of the candidate in the denominator of all ratios.
        control: The name of a candidate that is a second instance of the baseline.
        seconds: The time budget in seconds, excluding the warm-up. The comparison ends after half
            of this time if there is no control or the control's ratio is within the tolerance. At
            least ``min_rounds`` rounds are always run.
        tolerance: The tolerance around 1 for the confidence interval of the control's ratio.
        warm_up: The number of calls of each candidate before the first round.
        min_rounds: The minimum number of rounds. A 95% confidence interval requires 6.
        pairs: Pairs of candidates whose ratio (first over second) is also reported.
        profile: If True, profile the time and memory of each candidate in one additional call, and
            add the profile to the notes.
        timer: A function that calls a candidate and returns the run time in seconds. If None, a
            single call is timed, including the execution of its GPU kernels.
    """
    timer = timer or _time
    for _ in range(warm_up):
        for function in candidates.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0)
    start = time.perf_counter()
    while True:
        # Shuffle the order, because each candidate affects the caches for the next one.
        shuffle.shuffle(order)
        for name in order:
            times[name].append(timer(candidates[name]))
        found = Comparison(what, baseline, times, control, tolerance, pairs)
        spent, rounds = time.perf_counter() - start, len(times[baseline])
        if rounds >= min_rounds and (
            spent > seconds or (spent > seconds / 2 and (control is None or found.resolved))
        ):
            break
    if profile:
        found.notes["profile"] = {name: _profile(candidates[name]) for name in candidates}
    return found


def _profile(function: Callable[[], object]) -> str:
    with torch.profiler.profile(profile_memory=True) as found:
        function()
    averages = found.key_averages()
    options = {"row_limit": 12, "max_name_column_width": 40}
    tables = [
        averages.table(sort_by=f"self_{key}", **options)
        for key in ("cpu_time_total", "cpu_memory_usage")
    ]
    return "\n".join(tables)


def _time(function: Callable[[], object]) -> float:
    # Collect only the young generations, which contain the previous candidate's garbage.
    gc.collect(1)
    gc.disable()
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds


def synchronise() -> None:
    """Wait until all kernels on the GPU have finished. Without a GPU, return immediately."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
