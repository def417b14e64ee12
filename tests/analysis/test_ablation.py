"""Tests for the ablation grid: variants, their training and the printed table."""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from senet_transfer import UserError
from senet_transfer.analysis import ablation
from senet_transfer.analysis.ablation import (
    METRIC,
    PAPER,
    Variant,
    grid,
    grid_table,
    run_grid,
    write_grid,
)
from senet_transfer.analysis.complexity.count import Cost
from senet_transfer.cli.analysis.ablation import command

CONFIG = "configs/cifar10_se_resnet20.yaml"


@pytest.fixture(scope="module")
def variants():
    return grid(CONFIG)


@pytest.mark.long
def test_every_variant_differs_in_one_key(variants):
    standard, plain, *others = variants
    assert plain.options[:-1] == standard.options[:-1]
    assert (standard.options[-1], plain.options[-1]) == ("True", "False")
    assert plain.cost.se_parameters == 0
    for variant in others:
        assert variant.options[: len(standard.options)] == standard.options
        key, _ = variant.options[len(standard.options) :]
        assert key.startswith("MODEL.SE.")
    assert len({variant.folder for variant in variants}) == len(variants)
    assert {variant.axis for variant in others} == set(PAPER)


@pytest.mark.long
def test_invalid_variants_have_a_reason_and_duplicates_are_omitted(variants):
    refused = {(v.axis, v.value) for v in variants if v.refused}
    assert refused == {("ratio", "32"), ("placement", "3x3")}
    assert all(v.cost is None for v in variants if v.refused)
    there = {(v.axis, v.value) for v in variants}
    assert not there & {("ratio", "16"), ("squeeze", "avg"), ("stages", "5"), ("bias", "True")}


@pytest.mark.long
def test_variants_have_the_expected_cost(variants):
    cost = {v.folder: v.cost for v in variants}
    assert cost["ratio_8"].se_parameters > cost["standard"].se_parameters
    stages = [cost[f"stages_{stage}"].se_parameters for stage in (2, 3, 4)]
    assert sum(stages) == cost["standard"].se_parameters
    assert cost["squeeze_none"].parameters == cost["standard"].parameters
    assert cost["squeeze_none"].macs > cost["standard"].macs


@pytest.mark.long
def test_the_configs_own_variant_is_the_standard():
    found = grid(CONFIG, ["MODEL.SE.RATIO", "8"], ["ratio"])
    assert [v.value for v in found] == ["standard", "no SE", "2", "4", "16", "32"]


@pytest.mark.parametrize(
    ("config", "options", "axes", "said"),
    [
        (CONFIG, [], ["depth"], "axis 'depth' is unknown"),
        ("configs/faster_rcnn_se_r50.yaml", [], [], "expected ImageClassifier"),
        (CONFIG, ["DATASETS.TEST", "('a', 'b')"], [], r"TEST is \('a', 'b'\); expected a single"),
        (CONFIG, ["DATASETS.TEST", "()"], [], r"TEST is \(\); expected a single dataset"),
    ],
)
def test_configs_without_a_grid_are_rejected_with_a_clear_error(config, options, axes, said):
    with pytest.raises(UserError, match=said):
        grid(config, options, axes)


def errors(*values: float) -> list[dict]:
    return [{"classification": {"top1_error": value}} for value in values]


SOME = [
    Variant("", "standard", (), 22.28, Cost(parameters=2)),
    Variant("", "no SE", ("MODEL.SE.ENABLED", "False"), 23.30, Cost(parameters=1)),
    Variant("ratio", "32", (), 22.72, None, "too few channels"),
]


def test_all_variants_run_with_one_seed_before_the_next_seed(monkeypatch, tmp_path):
    folders = []

    def run_all(runs, **_):
        folders.extend(str(run.output_dir.relative_to(tmp_path)) for run in runs)
        return [errors(8.0)[0], *[None] * (len(runs) - 1)]

    monkeypatch.setattr(ablation, "run_all", run_all)
    results = run_grid(CONFIG, SOME, [5, 6], tmp_path)
    assert folders == ["standard/seed5", "no_SE/seed5", "standard/seed6", "no_SE/seed6"]
    assert results == ({"standard": errors(8.0)}, 3)


def test_sigterm_stops_the_run_and_the_command_exits_with_status_75(monkeypatch, tmp_path):
    terminated = []

    def start(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        return SimpleNamespace(
            poll=lambda: 75 if terminated else None,
            terminate=lambda: terminated.append(True),
            wait=time.sleep,
        )

    monkeypatch.setattr("senet_transfer.analysis.repeated_runs._start", start)
    monkeypatch.setattr(ablation, "grid", lambda *_: SOME)
    with pytest.raises(SystemExit) as ended:
        command(["--config-file", CONFIG, "--output", str(tmp_path), "--quiet"])
    assert (ended.value.code, terminated) == (75, [True])


def test_the_table_has_means_deviations_and_ranks():
    cost = Cost(parameters=1000, macs=2_000_000)
    variants = [
        Variant("", "standard", (), 22.28, cost),
        Variant("", "no SE", (), 23.30, cost),
        Variant("squeeze", "max", (), 22.57, cost),
        Variant("squeeze", "none", (), 22.93, cost),
        Variant("ratio", "32", (), 22.72, None, "too few channels"),
    ]
    results = {
        "standard": errors(8.0, 9.0),
        "no_SE": errors(9.0, 9.0),
        "squeeze_max": errors(8.0, 8.0),
        "squeeze_none": errors(8.75, 8.75),
    }
    table = grid_table(variants, results)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[2] == ["", "standard", "1,000", "2.0", "8.50 ± 0.71", "22.28"]
    assert cells[4][4:] == ["8.00 ± 0.00 (1)", "22.57 (2)"]
    assert cells[5][4:] == ["8.75 ± 0.00 (3)", "22.93 (3)"]
    assert cells[6][2:5] == ["-", "-", ""]
    assert table.endswith("ratio 32: too few channels")


def test_the_grid_is_written_with_all_results_and_options(tmp_path):
    variants = [Variant("", "standard", ("A", "B"), 22.28, Cost(parameters=7))]
    results = {"standard": errors(8.0)}
    path = Path(write_grid(variants, results, tmp_path))
    (row,) = json.loads(path.read_text())
    assert row["results"] == results["standard"]
    assert (row["parameters"], row["options"]) == (7, ["A", "B"])
    assert METRIC == "classification/top1_error"


@pytest.mark.slow
def test_finished_runs_of_a_grid_are_not_repeated(tree, tmp_path):
    options = [
        "DATASETS.TRAIN", f"('{tree}',)", "DATASETS.TEST", f"('{tree}',)", "MODEL.WEIGHTS", "",
        "MODEL.BACKBONE.ARCH", "cifar_resnet8", "SOLVER.MAX_ITER", "2", "MODEL.DEVICE", "cpu",
        "INPUT.CLASSIFICATION.CROP", "32", "INPUT.CLASSIFICATION.TEST_RESIZE", "32",
        "INPUT.CLASSIFICATION.TEST_CROP", "32",
    ]  # fmt: skip
    config = "configs/instant/finetune_folder.yaml"
    variants = grid(config, options, ["excitation"])
    first, _ = run_grid(config, variants, [0], tmp_path, quiet=True)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed0/results.json")}
    assert len(finished) == 4
    again = run_grid(config, variants, [0], tmp_path, quiet=True)
    assert again == (first, 0)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert len(re.findall(r"\d+\.\d\d", grid_table(variants, first))) >= 8
