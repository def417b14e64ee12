"""Tests for distributed training jobs, started with torchrun or ``--num-gpus``."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults import runs

pytestmark = pytest.mark.faults

# Time limit in seconds for two processes that import PyTorch twice on a busy machine.
LIMIT = 400


class Command:
    """Context manager that runs a command in a new process group and kills the group on exit."""

    def __init__(self, *words: str):
        self.log = Path(words[-1]).with_suffix(".job")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=runs.ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """Return everything that the command has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, ready) -> None:
        until = time.monotonic() + LIMIT
        while not ready():
            assert self.process.poll() is None, self.output()[-3000:]
            assert time.monotonic() < until, self.output()[-3000:]
            time.sleep(0.02)

    def children(self) -> list[int]:
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def ends(self, limit: float = LIMIT) -> int:
        return self.process.wait(limit)


def torchrun(run: runs.Work, *options: str, flags: tuple[str, ...] = ()) -> Command:
    start = ["-m", "torch.distributed.run", *options, "tools/train_net.py"]
    return Command(*start, *flags, *run.words, "OUTPUT_DIR", str(run.folder))


def test_under_torchrun_a_job_resumes_after_kill_9_of_one_worker(work, straight):
    unbroken, _ = straight("shards", ranks=2)
    run = work("shards")
    with torchrun(run, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1") as job:
        job.wait_for((run.folder / "model_0000002.pth.sha256").is_file)
        os.kill(job.children()[-1], signal.SIGKILL)
        assert job.ends() == 0, job.output()[-3000:]
        output = job.output()
    assert "The launcher has restarted this command. Resuming the run." in output
    assert output.count("Starting training from iteration 0") == 1
    run.assert_clean()
    run.assert_ends_as(unbroken)


def test_two_nodes_train_evaluate_and_resume_like_one_machine(work, straight, words):
    unbroken, _ = straight("shards", ranks=2)
    keys = dict(zip(words["shards"][2::2], words["shards"][3::2], strict=True))
    evaluate = ("DATASETS.TEST", keys["DATASETS.TRAIN"], "INPUT.CLASSIFICATION.TEST_CROP", "32")
    run = work("shards", *evaluate, "INPUT.CLASSIFICATION.TEST_RESIZE", "36")

    def job(*flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
        shared += ["--master-port", port, "--node-rank"]
        first, second = (torchrun(run, *shared, rank, flags=flags) for rank in "01")
        with first, second:
            assert (first.ends(), second.ends()) == (0, 0), first.output()[-3000:]

    job()
    run.assert_ends_as(unbroken)
    results = runs.read_json(run.folder / "results.json")
    assert results["classification"]["images"] == 18
    for name in ("model_final.pth", "model_0000008.pth", "results.json"):
        (run.folder / name).unlink()
    (run.folder / "last_checkpoint").write_text("model_0000005.pth")
    job("--resume")
    assert "Starting training from iteration 6" in (run.folder / "log.txt").read_text()
    run.assert_ends_as(unbroken)
    assert (
        runs.read_json(run.folder / "results.json")["classification"] == results["classification"]
    )


@pytest.mark.parametrize("harm", ["stop", "kill"])
def test_the_command_that_started_two_processes_exits_with_them(work, straight, harm):
    unbroken, _ = straight("shards", ranks=2)
    run = work("shards")
    start = ["tools/train_net.py", "--num-gpus", "2", "--dist-url", "auto", *run.words]
    with Command(*start, "OUTPUT_DIR", str(run.folder)) as job:
        job.wait_for((run.folder / "model_0000002.pth.sha256").is_file)
        if harm == "stop":
            os.kill(job.process.pid, signal.SIGTERM)
            assert job.ends(60) in (75, 0), job.output()[-3000:]
        else:
            # The first child process is multiprocessing's resource tracker.
            os.kill(job.children()[-1], signal.SIGKILL)
            assert job.ends(60) == 1
            assert (
                "terminated with signal SIGKILL. The other processes were stopped" in job.output()
            )
    run.go_on(ranks=2)
    run.assert_ends_as(unbroken)


def test_gradients_of_two_times_four_images_equal_those_of_eight(work, words, disk):
    tree = Path(words["folder"][-1].strip("(',)"))
    eight = disk / "eight"
    for name, count in (("blue", 3), ("green", 3), ("red", 2)):
        for index in range(count):
            (eight / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / name / f"{index}.jpg", eight / name)
    # With a learning rate of 1 and no momentum, a step of SGD changes a weight by its gradient.
    descent = {
        "BASE_LR": "1.0",
        "MOMENTUM": "0.0",
        "WEIGHT_DECAY": "0.0",
        "WEIGHT_DECAY_NORM": "0.0",
    }
    descent |= {"WARMUP_ITERS": "0", "MAX_ITER": "1", "STEPS": "()", "IMS_PER_BATCH": "8"}
    options = [word for key, value in descent.items() for word in (f"SOLVER.{key}", value)]
    options += ["SOLVER.AMP.ENABLED", "False", "MODEL.CLASSIFIER.DROPOUT", "0.0"]
    options += ["MODEL.CLASSIFIER.MIXUP", "0.0", "DATASETS.TRAIN", f"('{eight}',)"]
    models = []
    for ranks, rate in ((1, "0.0"), (1, "1.0"), (2, "1.0")):
        run = work("folder", *options, "SOLVER.BASE_LR", rate)
        run.folder = run.folder.with_name(f"{ranks}_{rate}")
        processes = run.start_ranks(ranks=2) if ranks == 2 else [run.start()]
        assert [runs.end_of(process) for process in processes] == [0] * ranks, run.output()[-2000:]
        models.append(runs.load(run.folder / "model_final.pth")["model"])
    start, one, two = models
    gradients = [start[key] - one[key] for key in start]
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3
    for key in start:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)


def test_resuming_with_other_processes_is_logged_as_approximate(half):
    run = half("shards")
    processes = run.start_ranks("--resume", ranks=2)
    assert [runs.end_of(process) for process in processes] == [0, 0], run.output()[-3000:]
    assert run.started_at() == 9
    assert "can't be resumed exactly: processes 1 before, 2 now." in run.output()


def test_resuming_with_another_batch_size_is_logged_as_approximate(half):
    run = half("folder")
    run.words = [*run.words, "SOLVER.IMS_PER_BATCH", "2"]
    assert run.run("--resume") == 0, run.output()[-3000:]
    assert run.started_at() == 9
    assert "can't be resumed exactly: images a step 4 before, 2 now." in run.output()
