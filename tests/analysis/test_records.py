"""Tests for the recorded results of training runs, and for the result tables in documents."""

import hashlib
import json
import math
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from senet_transfer import UserError
from senet_transfer.analysis.repeated_runs import Run
from senet_transfer.analysis.results.curves import draw_curves, evaluations
from senet_transfer.analysis.results.records import read_record, write_record
from senet_transfer.analysis.results.tables import (
    baselines,
    comparison,
    read_records,
    transfer,
    update_documents,
    updated_text,
    with_se,
)
from senet_transfer.analysis.results.welch import difference, t_quantile
from senet_transfer.cli.analysis.gates import parser as gates
from senet_transfer.cli.analysis.sweep import command as sweep
from senet_transfer.cli.analysis.sweep import parser
from senet_transfer.cli.little_data.probe import parser as probe
from senet_transfer.cli.push import parser as push
from senet_transfer.config.load import load_config
from tests.processes import ROOT

CONFIG = "configs/instant/cifar10_se_resnet20.yaml"
RESULTS = ROOT / "results"


@pytest.mark.parametrize("freedom", [1, 2, 3.7, 30])
def test_the_quantile_equals_scipys(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)


def test_the_interval_equals_scipys():
    plain, se = [8.61, 8.42, 8.93], [8.31, 8.02, 8.27, 8.11]
    shift, half = difference(plain, se)
    theirs = stats.ttest_ind(se, plain, equal_var=False).confidence_interval(0.95)
    assert (shift - half, shift + half) == pytest.approx((theirs.low, theirs.high), rel=1e-6)
    assert math.isnan(difference([1.0], [2.0, 3.0])[1])
    assert difference([1.0, 1.0], [2.0, 2.0]) == (1.0, 0.0)


def record(config: str, seed: int, error: float) -> dict:
    """Return a record of a run on CIFAR-10 images that were recompressed as JPEG."""
    return {
        "config": config,
        "options": ["DATASETS.TRAIN", "('cifar10_jpeg',)", "DATASETS.TEST", "('cifar10_jpeg',)"],
        "seed": seed,
        "network": "ResNet-110",
        "data": "CIFAR-10 recompressed as JPEG",
        "metric": "classification/top1_error",
        "metrics": {"classification/top1_error": error},
        "training": {"steps": 64_000, "images_per_step": 128, "minutes": 13.0 + seed},
        "machine": {"device": "a GPU", "cores": 16, "torch": "2.11.0"},
    }


def test_a_document_gets_the_means_the_interval_and_the_papers_values(tmp_path):
    errors = {"cifar10_resnet110": (8.5, 8.7), "cifar10_se_resnet110": (7.9, 8.1)}
    for config, values in errors.items():
        (tmp_path / "results" / config).mkdir(parents=True)
        for seed, error in enumerate(values):
            path = tmp_path / "results" / config / f"seed{seed}.json"
            path.write_text(json.dumps(record(config, seed, error)))
    page = tmp_path / "page.md"
    page.write_text(
        "Before.\n\n<!-- results: cifar10_resnet110 -->\n<!-- end of results -->\nAfter.\n"
    )
    sweep(["--results", str(tmp_path / "results"), "--update", str(page)])
    before, _, head, _, row, end, after = page.read_text().splitlines()[1:]
    assert (before, end, after) == ("", "<!-- end of results -->", "After.")
    # Computed by hand with a standard error of 0.1414, 2 degrees of freedom and t = 4.3027.
    assert row.strip("| ").split(" | ") == [
        "CIFAR-10 recompressed as JPEG, top-1 error (%)", "ResNet-110", "2 / 2",
        "8.60 ± 0.14", "8.00 ± 0.14", "−0.60 (−1.21 to +0.01)", "6.37 / 5.21",
    ]  # fmt: skip
    assert len(head.split("|")) == len(row.split("|"))
    with pytest.raises(UserError, match="no placeholder for a result table"):
        updated_text("text", {})


def test_the_curves_have_the_evaluations_that_all_runs_have(tmp_path):
    evaluated = {"bccd_r18": [(9, 1.0), (19, 3.0)], "transfer_bccd_r18": [(9, 2.0), (19, 4.5)]}
    for config, points in evaluated.items():
        (tmp_path / config).mkdir()
        for seed in (0, 1):
            ap = {"metric": "bbox/AP", "metrics": {"bbox/AP": 3.0}}
            written = {**record(config, seed, 1.0), **ap}
            (tmp_path / config / f"seed{seed}.json").write_text(json.dumps(written))
            rows = [
                "iteration,total_loss,bbox/AP",
                "4,0.7,",
                *(f"{i},,{v + seed}" for i, v in points),
            ]
            rows += ["29,0.5,7.5"] if seed else []
            (tmp_path / config / f"seed{seed}.csv").write_text("\n".join(rows))
    records = read_records(tmp_path)
    curve = evaluations(tmp_path / "bccd_r18", records["bccd_r18"])
    assert curve == {9: [1.0, 2.0], 19: [3.0, 4.0]}
    sweep(["--results", str(tmp_path), "--curves", str(tmp_path)])
    assert [path.name for path in tmp_path.glob("*.png")] == ["curves_bccd_r18.png"]
    pixels = np.asarray(Image.open(tmp_path / "curves_bccd_r18.png").convert("RGB"))
    blue, orange = ((pixels == colour).all(-1).sum() for colour in ((0, 114, 178), (213, 94, 0)))
    assert blue > 300
    assert orange == 0  # no run has SE
    (tmp_path / "bccd_r18" / "seed1.csv").write_text("iteration,total_loss,bbox/AP\n9,,high")
    with pytest.raises(UserError, match=r"seed1.csv can't be read as a training curve"):
        draw_curves(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_the_tables_in_the_documents_match_the_records(name):
    text = (ROOT / name).read_text()
    assert "<!-- results" in text
    assert updated_text(text, read_records(RESULTS)) == text, "run results/run.sh tables"


def test_the_readme_counts_the_comparisons_in_which_se_is_better():
    records = read_records(RESULTS)
    better = []
    for name in baselines(records):
        values = [
            [one["metrics"][one["metric"]] for one in records[config]]
            for config in (name, with_se(name, records))
        ]
        sign = -1 if "error" in records[name][0]["metric"] else 1
        better.append(sign * difference(*values)[0] > 0)
    assert (len(better), sum(better)) == (8, 5)
    readme = " ".join((ROOT / "README.md").read_text().split())
    claim = (
        "In our [eight comparisons](docs/results.md) of networks with and without SE, the networks "
        "with SE are better in five and worse in three."
    )
    assert claim in readme
    rows = re.findall(r"\((\S\d+\.\d+) to (\S\d+\.\d+)\)", readme)
    assert [low[0] == high[0] for low, high in rows] == [True, False, False, False]
    assert "only the confidence interval in the first row excludes 0." in readme


def test_records_are_small_and_state_how_they_were_made():
    for path in RESULTS.glob("*/seed*.json"):
        found = json.loads(path.read_text())
        assert found["config"] == path.parent.name
        assert {"commit", "command", "machine", "weights_sha256"} <= found.keys()
        assert not re.search(r"""[ "'(]/""", path.read_text()), "found an absolute path"
        files = [path] if "probe" in found["network"] else [path, path.with_suffix(".csv")]
        for file in files:
            assert file.stat().st_size < 10_000


@pytest.fixture
def finished_run(tmp_path) -> Run:
    """Write the files of a finished run that was resumed once and took three minutes in total."""
    folder = tmp_path / "run"
    folder.mkdir()
    options = ("DATASETS.TRAIN", "('cifar10_jpeg',)", "DATASETS.TEST", "('cifar10_jpeg',)", "SEED",
               "4")  # fmt: skip
    (folder / "config.yaml").write_text(load_config(CONFIG, options).dump())
    seconds = [*range(2, 122, 2), *range(2, 62, 2)]
    rows = [
        {"iteration": 20 * n - 1, "total_loss": 2 / n, "elapsed_seconds": float(elapsed)}
        for n, elapsed in enumerate(seconds, 1)
    ]
    rows.append({"iteration": 1800, "classification/top1_error": 9.5})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    results = {"classification": {"top1_error": 9.5}, "training": {"iterations": 1800}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "model_final.pth").write_bytes(b"weights")
    (folder / "run.json").write_text("{}")
    return Run(CONFIG, options, folder)


def test_a_record_contains_what_is_needed_to_repeat_the_run(finished_run, tmp_path, monkeypatch):
    path = write_record(finished_run, tmp_path / "results")
    assert path == tmp_path / "results" / "cifar10_se_resnet20" / "seed4.json"
    found = json.loads(path.read_text())
    assert found["data"] == "CIFAR-10 recompressed as JPEG"
    assert found["metrics"] == {"classification/top1_error": 9.5}
    assert found["training"] == {"steps": 1800, "images_per_step": 4, "minutes": 3.0}
    hashed = subprocess.run(["sha256sum", finished_run.output_dir / "model_final.pth"],
                            capture_output=True, text=True, check=True)  # fmt: skip
    assert found["weights_sha256"] == hashed.stdout.split()[0]
    words = shlex.split(found["command"])
    assert words[:3] == ["senet", "train", "--config-file"]
    assert load_config(CONFIG, words[4:]) == load_config(CONFIG, finished_run.options)
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "iteration,total_loss,classification/top1_error"
    assert lines[-2:] == ["1799,0.022222,", "1800,,9.5"]
    assert len(lines) < 40
    # An existing record of the same run is kept. A run with different options is an error.
    before = path.read_bytes()
    monkeypatch.setenv("GIT_COMMIT", "other")
    assert write_record(finished_run, tmp_path / "results").read_bytes() == before
    other = Run(CONFIG, (*finished_run.options, "SOLVER.BASE_LR", "0.5"), finished_run.output_dir)
    with pytest.raises(UserError, match="record of a run with different options"):
        write_record(other, tmp_path / "results")


def test_runs_of_different_settings_are_not_recorded_together(finished_run, tmp_path):
    """Check that a run is rejected if the config was edited after another run was recorded."""
    config = tmp_path / Path(CONFIG).name
    for rate, message in ((0.1, ""), (0.2, "different settings")):
        config.write_text(f"_BASE_: {ROOT / CONFIG}\nSOLVER:\n  BASE_LR: {rate}\n")
        run = Run(str(config), finished_run.options, finished_run.output_dir)
        if message:
            with pytest.raises(UserError, match=message):
                write_record(run, tmp_path / "results")
        else:
            write_record(run, tmp_path / "results")


def test_runs_that_start_from_different_files_are_not_recorded_together(finished_run, tmp_path):
    begun = finished_run.output_dir / "run.json"
    hashes = [hashlib.sha256(part).hexdigest() for part in (b"one", b"another")]
    begun.write_text(json.dumps({"SHA-256 of MODEL.WEIGHTS": hashes[0]}))
    found = read_record(write_record(finished_run, tmp_path / "results"))
    assert found["initial_weights_sha256"] == hashes[0]
    other = Run(CONFIG, (*finished_run.options, "SEED", "5"), finished_run.output_dir)
    for content in ({"SHA-256 of MODEL.WEIGHTS": hashes[1]}, {}):
        begun.write_text(json.dumps(content))
        with pytest.raises(UserError, match="different initial_weights_sha256"):
            write_record(other, tmp_path / "results")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data", "CIFAR-10"),
        ("options", ["SOLVER.EPOCHS", "30"]),
        ("training", {"steps": 32_000, "images_per_step": 128, "minutes": 1.0}),
        ("training", {"steps": 64_000, "images_per_step": 64, "minutes": 1.0}),
    ],
)
def test_networks_with_different_training_are_not_compared(key, value):
    names = ("cifar10_resnet110", "cifar10_se_resnet110")
    records = {name: [record(name, seed, 8.0) for seed in (0, 1)] for name in names}
    assert "| 8.00 ± 0.00 | 8.00 ± 0.00 |" in comparison(records, names[:1])
    for one in records[names[1]]:
        one[key] = value
    message = f"can't be compared, because they differ in {key}"
    with pytest.raises(UserError, match=f"{' and '.join(names)} {message}"):
        comparison(records, names[:1])
    carried = {"transfer_cifar10_resnet110": records[names[1]], names[0]: records[names[0]]}
    with pytest.raises(UserError, match=message):
        transfer(carried, ["transfer_cifar10_resnet110"])


@pytest.mark.parametrize("patience", [0, 3])
def test_runs_have_the_same_number_of_steps_unless_they_stop_early(
    finished_run, tmp_path, patience
):
    options = (*finished_run.options, "TEST.PATIENCE", str(patience))
    write_record(Run(CONFIG, options, finished_run.output_dir), tmp_path / "results")
    results = json.loads((finished_run.output_dir / "results.json").read_text())
    results["training"]["iterations"] = 900
    (finished_run.output_dir / "results.json").write_text(json.dumps(results))
    other = Run(CONFIG, (*options, "SEED", "5"), finished_run.output_dir)
    if patience:
        write_record(other, tmp_path / "results")
    else:
        with pytest.raises(UserError, match="different training: .*1800.*; expected .*900"):
            write_record(other, tmp_path / "results")


def test_a_run_without_a_finite_metric_leaves_no_record(finished_run, tmp_path):
    results = {"classification": {"top1_error": None}, "training": {"iterations": 1800}}
    (finished_run.output_dir / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="no finite value of classification/top1_error"):
        write_record(finished_run, tmp_path / "results")
    assert not list((tmp_path / "results").glob("*/*.json"))


def test_the_machine_and_the_commit_are_recorded_at_training(finished_run, tmp_path):
    trained = {"machine": {"device": "a GPU", "cores": 16, "torch": "2.11"}, "commit": "0123abc"}
    (finished_run.output_dir / "origin.json").write_text(json.dumps(trained))
    found = read_record(write_record(finished_run, tmp_path / "results"))
    assert {key: found[key] for key in trained} == trained


def test_a_record_has_the_hash_of_the_weights_that_were_evaluated(finished_run, tmp_path):
    (finished_run.output_dir / "model_ema.pth").write_bytes(b"averaged weights")
    run = Run(
        CONFIG, (*finished_run.options, "SOLVER.EMA.ENABLED", "True"), finished_run.output_dir
    )
    found = read_record(write_record(run, tmp_path / "results"))
    hashed = hashlib.sha256(b"averaged weights").hexdigest()
    assert found["weights_sha256"] == hashed


def test_a_machine_without_git_needs_the_commit_in_a_variable(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GIT_COMMIT", "0123abc")
    assert read_record(write_record(finished_run, tmp_path / "results"))["commit"] == "0123abc"


def test_invalid_records_and_documents_are_errors(finished_run, tmp_path):
    folder = tmp_path / "results"
    with pytest.raises(UserError, match=r"results does not exist"):
        read_records(folder)
    path = write_record(finished_run, folder)
    with pytest.raises(UserError, match=r"tables in .*missing.md can't be updated"):
        update_documents(folder, [tmp_path / "missing.md"])
    path.write_text(json.dumps({**read_record(path), "metrics": {}}))
    for function in (read_records, lambda _: write_record(finished_run, folder)):
        with pytest.raises(UserError, match=r"seed4.json is not .* classification/top1_error"):
            function(folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to do"),
        (["--config-file", CONFIG], "--output is missing"),
        (["--update", "README.md"], "--results is missing"),
        (["--config-file", CONFIG, "--output", "o", "--jobs", "0"], "--jobs is 0"),
        (["--config-file", CONFIG, "--output", "o", "--seeds", "0", "0"], "same output folder"),
    ],
)
def test_arguments_that_do_not_fit_together_are_an_error(words, said, capsys):
    with pytest.raises(SystemExit):
        sweep(words)
    assert said in capsys.readouterr().err


PARTS = ["cifar20", "cifar110", "shapes", "places", "bccd", "bccd50", "pretrain", "transfer_bccd"]


@pytest.mark.parametrize("part", [*PARTS, "transfer_places"])
def test_the_script_trains_a_network_without_and_with_se(part, printed):
    ((tool, *words),) = printed(part)
    assert tool == "tools/run_seeds.py"
    args = parser().parse_args(words)
    plain, se = (load_config(config, args.opts) for config in args.config_file)
    assert (bool(plain.MODEL.SE.ENABLED), se.MODEL.SE.ENABLED) == (False, True)
    assert args.results == "results"
    assert Path(args.output) == Path("output")


@pytest.mark.parametrize(
    ("part", "count", "command_parser"),
    [("tables", 1, parser), ("probe", 2, probe), ("gates", 6, gates), ("publish", 9, push)],
)
def test_the_other_commands_of_the_script_are_valid(part, count, command_parser, printed):
    commands = printed(part)
    assert len(commands) == count
    for words in commands:
        command_parser().parse_args(words[1:] if part == "tables" else words[3:])


@pytest.fixture
def printed(tmp_path):
    """Return a function that lists the Python commands that results/run.sh runs.

    The function's argument is passed to the script, e.g. "cifar20". A fake Python prints the
    commands instead of running them.
    """
    printer = tmp_path / "python"
    printer.write_text(
        """#!/bin/sh
for word; do
    printf "%s\\n" "$word"
    if [ "$before" = --output ]; then
        mkdir -p "$word"
        touch "$word/blocks.png" "$word/blocks.csv"
    fi
    before=$word
done
echo END
"""
    )
    printer.chmod(0o755)
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    trained = ["cifar10_resnet20", "cifar10_se_resnet20", "bccd_se_r18", "cifar10_64px_r18"]
    for config in (*trained, "demo_faster_rcnn_se_r18", "demo_places365_se_r18"):
        (tmp_path / "results" / config).mkdir(parents=True)
        run = tmp_path / "output" / config / ("seed0" if "64px" in config else "seed1")
        run.mkdir(parents=True)
        (run / "model_final.pth").touch()
    (tmp_path / "results" / "gates").mkdir()

    def run_part(part: str) -> list[list[str]]:
        done = subprocess.run(
            [ROOT / "results" / "run.sh", part], cwd=tmp_path, text=True, capture_output=True,
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(printer)}, check=True,
        )  # fmt: skip
        return [text.splitlines() for text in done.stdout.split("END\n")[:-1]]

    return run_part
