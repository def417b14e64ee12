"""Tests for the benchmark's statistics and command line."""

import json
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmark import Comparison, Ratio, compare, saved_bytes
from benchmark.memory import highest_sum, peak_bytes
from tests.processes import ROOT


@pytest.mark.parametrize("count", [6, 11, 12, 25, 100])
@pytest.mark.long
def test_the_interval_has_the_nominal_coverage_of_the_median(count):
    draw = random.Random(count)
    found = [Ratio.of([draw.gauss(1.5, 0.1) for _ in range(count)]) for _ in range(2000)]
    assert sum(ratio.low <= 1.5 <= ratio.high for ratio in found) / 2000 > 0.94
    # The interval is not too wide: if it is halved, it contains the median less often.
    skipped = sum(ratio.low <= 1.5 <= ratio.high for ratio in map(_narrower, found)) / 2000
    assert skipped < 0.9


def _narrower(ratio: Ratio) -> Ratio:
    half = (ratio.high - ratio.low) / 4
    return Ratio(ratio.value, ratio.value - half, ratio.value + half)


def test_ratios_are_taken_within_a_round():
    """Check that time ratios stay exact if the machine becomes ten times slower between rounds."""
    drift = [1.0 + index for index in range(11)]
    found = Comparison("", "a", {"a": drift, "b": [1.1 * second for second in drift]})
    ratio = found.ratio("b")
    assert (ratio.low, ratio.high) == (pytest.approx(1.1), pytest.approx(1.1))


def test_ratios_of_other_pairs_are_reported_next_to_the_baselines():
    seconds = {"a": [1.0] * 11, "b": [2.0] * 11, "c": [8.0] * 11}
    found = Comparison("", "a", seconds, pairs=[("c", "b")])
    assert "c over b: 4.000 [4.000, 4.000]" in str(found)
    (pair,) = found.as_dict()["pairs"]
    assert (pair["of"], pair["over"], pair["ratio"]["value"]) == ("c", "b", 4.0)


def test_a_comparison_is_resolved_only_by_its_control():
    steady, shaky = [1.0] * 11, [1.0, 1.1] * 5 + [1.0]
    assert Comparison("", "a", {"a": steady, "b": steady}, control="b").resolved
    assert not Comparison("", "a", {"a": steady, "b": shaky}, control="b").resolved
    assert not Comparison("", "a", {"a": steady, "b": steady}).resolved


def test_candidates_take_turns():
    calls = []
    found = compare(
        "turns",
        {name: lambda name=name: calls.append(name) for name in "abc"},
        baseline="a",
        seconds=0,
        warm_up=1,
    )
    rounds = list(zip(*[iter(calls[3:])] * 3, strict=True))
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 1
    assert len(rounds) == len(found.seconds["a"]) == found.as_dict()["rounds"]


def test_saved_bytes_equal_the_storages_that_autograd_saves():
    layer = nn.Linear(4, 8)
    x = torch.randn(16, 4)
    held = []
    # Autograd saves the layer's input and the sigmoid's output. The weight is not counted.
    forward = lambda: held.append(layer(x).sigmoid())  # noqa: E731
    assert saved_bytes(forward, layer) == 4 * (16 * 4 + 16 * 8)


def test_the_peak_is_the_largest_simultaneous_allocation():
    assert highest_sum([5, 3, -8, 6, -6]) == 8

    def work() -> None:
        first = torch.zeros(1 << 20)
        del first
        torch.zeros(1 << 18).add(1)

    assert peak_bytes(work) == pytest.approx(4 << 20, rel=0.01)


def test_a_benchmark_starts_without_the_export_packages(run_python):
    line = "import runpy, sys; sys.modules['onnxruntime'] = sys.modules['onnx'] = None; "
    line += "sys.path[0] = 'tools'; import benchmark.networks, benchmark.inference; "
    line += "runpy.run_path('tools/benchmark.py', run_name='__main__')"
    done = run_python("-c", line, "--help")
    assert done.returncode == 0, done.stderr


def test_the_command_starts_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / "tools/benchmark.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: benchmark.py" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["block", "backbone", "inference", "detector", "loader", "scaling", "startup", "engine"],
)
def test_every_benchmark_runs_from_the_command_line(part, tmp_path):
    """Run one benchmark briefly; check that each implementation's speed ratio is reported."""
    output = tmp_path / "benchmark.json"
    command = ["tools/benchmark.py", part, "--seconds", "0", "--quiet", "--output", str(output)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    rows = json.loads(output.read_text())["parts"][part]
    assert rows
    for row in rows:
        assert row["baseline"] in row["candidates"]
        assert all(candidate["ratio"] for candidate in row["candidates"].values())
