"""Tests for the GPU benchmark, and for packing it into an archive for offline machines.

The benchmark's tests cover its performance targets, its subprocesses and a full dry run.
"""

import json
import math
import os
import subprocess
import sys
import time
import tomllib
import types
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmark import gpu_archive
from benchmark.gpu import run
from benchmark.gpu.measure import Settings
from benchmark.gpu.remote import RemoteError, call_remote, start_all
from benchmark.gpu.targets import TARGETS, Result, as_markdown, as_text, table
from benchmark.report import Amounts
from senet_transfer.errors import RunError, UserError
from tests.processes import ROOT

ROW = Amounts("time", "ms", "plain", {"plain": 2.0, "SE": 3.0})


def test_a_value_meets_its_target_on_the_right_side_of_the_bound():
    values = {"graph": 1.03, "graph_fused": 0.951, "cifar": 10_000.0, "cifar_se": 6_999.0}
    rows = {row["key"]: row for row in table({key: Result(v) for key, v in values.items()})}
    assert [rows[key]["met"] for key in values] == [True, False, True, False]


def test_only_finite_values_are_reported_as_measured():
    rows = table({"memory": Result(math.nan), "eager": Result(1.2, spread=0.07)})
    assert [row["key"] for row in rows if "measured" in row] == ["eager"]
    assert as_text(rows).count("not measured") == len(TARGETS) - 1
    assert "1.2  MISSED  (spread of the control: 7.0%)" in as_text(rows)


def test_the_document_lists_every_target():
    document = " ".join((ROOT / "docs/performance.md").read_text().split())
    for target in TARGETS.values():
        assert f"| {target.what} | {target.text} |" in document


@pytest.fixture
def parts(monkeypatch):
    """Return a function that replaces the benchmark's measurements with the given functions."""

    def use(**functions):
        module = types.ModuleType("benchmark.gpu.fakes")
        for name, function in functions.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, "benchmark.gpu.fakes", module)
        monkeypatch.setattr(
            run, "PARTS", {name: run.Part("fakes", name, 1.0) for name in functions}
        )

    return use


def row_then(action):
    def measure(settings):
        yield ROW, {"memory": Result(1.01)}
        action()
        yield ROW, {"graph": Result(9.0)}

    return measure


def fail():
    raise ValueError("a kernel has failed")


def unavailable():
    raise UserError("SOLVER.COMPILE is 'graph'")


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: time.sleep(60), "out of time"),
        (fail, "a kernel has failed"),
        (lambda: os._exit(1), "its process has ended"),
    ],
)
@pytest.mark.long
def test_rows_of_an_incomplete_part_are_kept_and_the_next_part_runs(
    parts, tmp_path, capsys, action, expected
):
    parts(incomplete=row_then(action), complete=row_then(lambda: None))
    report = run.Report(str(tmp_path / "gpu.json"), "", dry_run=False)
    start = time.monotonic()
    for name in ("incomplete", "complete"):
        run.run_part(name, Settings(deadline=time.monotonic() + 1), report)
    with pytest.raises(RunError, match="benchmark are incomplete: incomplete"):
        report.finish(1.0)
    assert time.monotonic() - start < 30
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["part"] for row in found["rows"]] == ["incomplete", "complete", "complete"]
    assert expected in found["notes"]["incomplete"]
    measured = {row["key"]: row["measured"] for row in found["targets"] if "measured" in row}
    assert measured == {"memory": 1.01, "graph": 9.0}
    assert "ratio 1.500" in capsys.readouterr().out


def test_an_unavailable_option_is_not_a_failure(parts, tmp_path):
    parts(graph=row_then(unavailable))
    report = run.Report(str(tmp_path / "gpu.json"), "", dry_run=False)
    run.run_part("graph", Settings(), report)
    report.finish(1.0)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["notes"] == {"graph": "not available: SOLVER.COMPILE is 'graph'"}


@pytest.mark.long
def test_steps_in_other_processes_return_their_time_and_errors():
    def build_wait():
        return lambda: time.sleep(0.02)

    with start_all(Settings(), {"wait": build_wait, "broken": fail}) as started:
        assert set(started.steps) == {"wait"}
        assert 0.02 <= call_remote(started.steps["wait"]) < 10
        with pytest.raises(RemoteError, match=r"(?s)broken: .*a kernel has failed"):
            started.check()


def test_without_a_gpu_the_benchmark_explains_the_dry_run(monkeypatch):
    monkeypatch.setattr(run, "_has_gpu", lambda: False)
    with pytest.raises(UserError, match="--dry-run"):
        run.run(["card"])


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_in_a_dry_run(tmp_path):
    output = tmp_path / "gpu.json"
    words = ["tools/benchmark.py", "gpu", "--dry-run", "--output", str(output)]
    subprocess.run([sys.executable, "-W", "ignore", *words], cwd=ROOT, check=True)
    found = json.loads(output.read_text())
    missing = set(run.PARTS) - {row["part"] for row in found["rows"]}
    assert missing == set(found["notes"])
    assert all(note.startswith("not available") for note in found["notes"].values())
    assert not any("measured" in row for row in found["targets"])


def wheel(folder: Path, name: str, *requirements: str) -> None:
    project = name.split("-")[0]
    lines = ["Metadata-Version: 2.1", *(f"Requires-Dist: {word}" for word in requirements)]
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"{project}-1.dist-info/METADATA", "\n".join(lines))
        archive.writestr(f"{project}/_vendor/other-1.dist-info/METADATA", "")


@pytest.mark.parametrize(
    ("tag", "runs"),
    [
        ("py3-none-any", True),
        ("cp312-cp312-manylinux_2_28_x86_64", True),
        ("cp38-abi3-manylinux2014_x86_64", True),
        ("cp311-cp311-manylinux_2_28_x86_64", False),
        ("cp313-abi3-manylinux2014_x86_64", False),
        ("cp312-cp312-manylinux_2_34_x86_64", False),
        ("cp312-cp312-macosx_11_0_arm64", False),
    ],
)
def test_only_wheels_for_the_machine_are_packed(tmp_path, monkeypatch, tag, runs):
    monkeypatch.setattr(gpu_archive, "PACKED", ("one",))
    monkeypatch.setattr(gpu_archive, "PROVIDED", gpu_archive.PACKED + tuple(gpu_archive.pins()))
    wheel(tmp_path, f"one-1-{tag}.whl")
    if runs:
        gpu_archive.check_wheels(tmp_path)
    else:
        with pytest.raises(gpu_archive.PackError, match="is not for Python 3.12 on Linux"):
            gpu_archive.check_wheels(tmp_path)


def test_a_dependency_that_is_neither_packed_nor_provided_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_archive, "PACKED", ("one",))
    monkeypatch.setattr(gpu_archive, "PROVIDED", tuple(gpu_archive.pins()))
    extra = "unpacked; extra == 'docs'"
    older = "unpacked; python_version < '3.12'"
    wheel(tmp_path, "one-1-py3-none-any.whl", "torch>=2", extra, older)
    gpu_archive.check_wheels(tmp_path)
    wheel(tmp_path, "one-1-py3-none-any.whl", "unpacked>=2; python_version >= '3.12'")
    with pytest.raises(gpu_archive.PackError, match="one-1.* requires unpacked>=2"):
        gpu_archive.check_wheels(tmp_path)


def test_a_package_without_a_wheel_is_an_error(tmp_path):
    with pytest.raises(gpu_archive.PackError, match="There is no wheel for .*yacs"):
        gpu_archive.check_wheels(tmp_path)


def test_every_dependency_of_the_project_is_packed_or_provided():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(word).name) for word in project["dependencies"]}
    assert names <= {canonicalize_name(n) for n in (*gpu_archive.PACKED, *gpu_archive.PROVIDED)}
    assert {canonicalize_name(name) for name in gpu_archive.PACKED} <= gpu_archive.pins().keys()


def test_the_documented_table_matches_the_measurements():
    found = json.loads((ROOT / "results/gpu/h200.json").read_text())
    table = as_markdown(found["targets"], "one H200")
    assert table in (ROOT / "docs/performance.md").read_text()
    for row in found["targets"]:
        target = TARGETS[row["key"]]
        assert (row["what"], row["target"]) == (target.what, target.text)
        assert row["met"] == target.is_met_by(row["measured"])
