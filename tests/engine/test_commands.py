"""Tests that run the command-line tools in subprocesses."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from detectron2.utils import comm

from senet_transfer import UserError
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.config.load import load_config
from senet_transfer.config.validation import check_ranges
from senet_transfer.engine.run_checks import check_run
from senet_transfer.engine.setup import setup
from tests.processes import call

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def words(command):
    def make(*flags, **overrides) -> list[str]:
        run = command(**overrides)
        own = [word for entry in run.datasets for word in ("--dataset", *entry)]
        return ["tools/train_net.py", "--config-file", run.config_file, *flags, *own, *run.options]

    return make


SHORT = {"SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()"}


@pytest.mark.long
def test_a_quiet_run_prints_only_results_and_logs_everything(words, tmp_path, run_python):
    done = run_python(*words("--quiet", **SHORT))
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ") for line in done.stdout.splitlines())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert float(said["bbox/AP"]) == pytest.approx(results["bbox"]["AP"], rel=1e-4)
    diagnostics = results.pop("diagnostics")
    assert diagnostics["bbox"]["AP"] == pytest.approx(results["bbox"]["AP"], abs=1e-9)
    assert {name.split("/")[0] for name in said} == results.keys()
    assert "meshgrid" not in done.stderr
    assert "is_fx_tracing" not in done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "total_loss" in log
    assert "Running with full config" in log


@pytest.mark.parametrize(
    "line",
    [
        "--resume --quiet SEED 1 SOLVER.BASE_LR -1",
        "SEED 1 SOLVER.BASE_LR -1 --resume --quiet",
        "--quiet SEED 1 --resume SOLVER.BASE_LR -1",
    ],
)
def test_flags_can_be_before_after_and_between_config_options(line):
    args = argument_parser().parse_args(["--config-file", "a.yaml", *line.split()])
    assert (args.resume, args.quiet, args.config_file) == (True, True, "a.yaml")
    assert args.opts == ["SEED", "1", "SOLVER.BASE_LR", "-1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("bbox", "segm")),
        (["--iou-types", "segm"], ("segm",)),
        (["--iou-types", "bbox,segm", "TEST.DIAGNOSTICS", "()"], ("bbox", "segm")),
        (["TEST.DIAGNOSTICS", "()"], ()),
    ],
)
def test_iou_types_come_from_the_flag_or_the_config(words, expected):
    options = run_options(argument_parser().parse_args(words))
    kinds = load_config("", list(options.options)).TEST.DIAGNOSTICS
    assert kinds == expected


def test_an_unknown_iou_type_is_named_with_the_known_ones():
    options = run_options(argument_parser().parse_args(["--iou-types", "masks"]))
    with pytest.raises(UserError, match="contains 'masks'; expected 'bbox' or 'segm'"):
        check_ranges(load_config("", list(options.options)))


def test_an_unknown_flag_is_rejected_among_the_config_options_too(capsys):
    for line in ("SEED 1 --resumee", "--resumee SEED 1"):
        with pytest.raises(SystemExit) as refused:
            argument_parser().parse_args(line.split())
        assert refused.value.code == 2
        assert "--resumee" in capsys.readouterr().err


def test_a_user_error_is_one_line_and_status_2(words, run_python):
    done = run_python(*words(**{"MODEL.WEIGHTS": "no/such.pth"}))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: MODEL.WEIGHTS is no/such.pth")
    assert "Traceback" not in done.stderr


def test_an_image_broken_in_a_worker_is_named_without_the_workers_traceback(
    words, shapes, tmp_path, run_python
):
    data = tmp_path / "copy"
    shutil.copytree(shapes, data)
    for path in (data / "tiny").iterdir():
        # The image headers are intact, so the check at the start of the run finds no problem.
        path.write_bytes(path.read_bytes()[:-500])
    line = words(**SHORT, **{"DATALOADER.NUM_WORKERS": "1"})
    done = run_python(*[word.replace(str(shapes), str(data)) for word in line])
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: Image ")
    assert "bytes not processed" in last


def test_an_image_broken_for_one_process_of_two_is_named(words, shapes, tmp_path, run_python):
    data = tmp_path / "copy"
    shutil.copytree(shapes, data)
    path = sorted((data / "tiny").iterdir())[-1]
    path.write_bytes(path.read_bytes()[:-500])
    line = words(
        "--num-gpus", "2", "--dist-url", "auto", **{"SOLVER.MAX_ITER": "9", "SOLVER.STEPS": "()"}
    )
    done = run_python(*[word.replace(str(shapes), str(data)) for word in line])
    assert done.returncode == 2
    assert path.name in done.stderr
    assert "bytes not processed" in done.stderr


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fork", "torchrun"),
        pytest.param("spawn", "torchrun", marks=pytest.mark.slow),
        pytest.param("spawn", "spawn", marks=pytest.mark.slow),
        pytest.param("torchrun", "torchrun", marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_two_processes_on_the_cpu_train_evaluate_and_resume(
    words, first, second, tmp_path, run_python
):
    def start(launcher, *flags, **overrides):
        if launcher in ("fork", "spawn"):
            line = words("--num-gpus", "2", "--dist-url", "auto", *flags, **overrides)
            return run_python(*line) if launcher == "fork" else call(sys.executable, *line)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return call(*torchrun, "--nproc-per-node", "2", *words(*flags, **overrides))

    run = tmp_path / "run"
    done = start(first, **SHORT)
    assert done.returncode == 0, done.stderr
    assert "World size: 2" in (run / "log.txt").read_text()
    assert "bbox" in json.loads((run / "results.json").read_text())
    *_, sentence, table = done.stdout.split("\n\n")
    assert re.fullmatch(r"Trained se_\w+ for 1 step in .*; box AP \d+\.\d on own\.", sentence)
    assert str(run / "model_final.pth") in table
    assert "meshgrid" not in done.stderr
    again = start(second, "--resume", **{"SOLVER.MAX_ITER": "2", "SOLVER.STEPS": "(1,)"})
    assert again.returncode == 0, again.stderr
    log = (run / "log.txt").read_text()
    assert log.count("World size: 2") == 2
    assert "Starting training from iteration 1" in log


def test_sync_bn_in_several_cpu_processes_is_rejected(command, monkeypatch):
    cfg = setup(command(**{"MODEL.RESNETS.NORM": "SyncBN"}))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="SyncBN needs GPUs, but this run has 2 processes"):
        check_run(cfg, eval_only=False, resume=False)
