"""Paired timing: candidates in turn, round after round, and ratios with their 95% interval.

A machine's speed drifts by more than what is to be told apart, so candidates are never timed one
after the other: each round times every one once, and a ratio is taken within the round. And two
builds of one network differ by where their memory lies, so there is a control: the baseline built
twice. Rounds are added until the control's interval lies within the tolerance around 1; where
that does not happen in time, the comparison says that it is unresolved.
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

# Of 11, the interval leaves out the outermost two, which something else may have disturbed.
MIN_ROUNDS = 11


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and an interval that holds it with 95% confidence.

    The interval is that of the order statistics: it assumes no distribution, and rounds that
    something else on the machine disturbed don't widen it as they would one of a mean.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: list[float]) -> "Ratio":
        """The median of a sample, of 6 or more values for 95%; of fewer, with their range."""
        ordered = sorted(ratios)
        skip = _outside(len(ordered))
        return cls(statistics.median(ordered), ordered[skip], ordered[-1 - skip])

    def within(self, tolerance: float) -> bool:
        """Whether the whole interval is this close to 1."""
        return abs(self.low - 1) <= tolerance and abs(self.high - 1) <= tolerance

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _outside(count: int) -> int:
    """How many values at either end may be left outside of a 95% interval of the median."""
    tail, skip = 0.0, 0
    while skip < (count - 1) // 2:
        tail += math.comb(count, skip) / 2**count
        if tail > 0.025:
            break
        skip += 1
    return max(0, skip - 1)


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        what: in words.
        baseline: the candidate that ratios are over.
        seconds: of every candidate, a value a round.
        control: the name of the candidate that is the baseline built again; None for none.
        tolerance: how near to 1 the control's interval has to be.
        pairs: further ratios to tell: of the first candidate over the second.
        notes: further facts, for the JSON.
    """

    what: str
    baseline: str
    seconds: Mapping[str, list[float]]
    control: str | None = None
    tolerance: float = 0.01
    pairs: Sequence[tuple[str, str]] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def ratio(self, name: str, over: str | None = None) -> Ratio:
        """Of one candidate over another; None is the baseline."""
        below = self.seconds[over or self.baseline]
        return Ratio.of([a / b for a, b in zip(self.seconds[name], below, strict=True)])

    @property
    def resolved(self) -> bool:
        """Whether the control lies within the tolerance; without a control it does not."""
        return self.control is not None and self.ratio(self.control).within(self.tolerance)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: medians and spreads (the quartiles' distance) in seconds, and the ratios."""
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
) -> Comparison:
    """Times functions against each other.

    Args:
        what: is compared, in words.
        candidates: functions without arguments, by name.
        baseline: the name of the one that ratios are over.
        control: the name of a candidate that is the baseline, built again.
        seconds: may be spent, beyond the warm-up and the first rounds. A control within the
            tolerance ends the comparison earlier, after half of this.
        tolerance: see :class:`Comparison`.
        warm_up: calls of each before the first round.
        min_rounds: however long they take; an interval needs 6.
        pairs: see :class:`Comparison`.
        profile: where each candidate's time and memory go, in one more call, in the notes.
    """
    for _ in range(warm_up):
        for function in candidates.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0)
    start = time.perf_counter()
    while True:
        # The order changes, since a candidate finds the caches as the one before left them.
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_time(candidates[name]))
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
    # The young generations alone: what a candidate leaves in cycles, not all that was imported.
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
    """Waits for what a GPU, if there is one, was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
