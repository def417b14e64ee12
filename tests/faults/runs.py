"""Runs of tools/train_net.py in subprocesses, with optional injected failures.

Importing PyTorch and Detectron2 takes longer than a small run, so a fork server imports them once.
Each run executes the script in a process forked from this server.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from senet_transfer.engine.checkpoints import checkpoint_history as history
from tests.comparing import assert_same

ROOT = Path(__file__).resolve().parents[2]
PERIOD = 3
ITERATIONS = 11
# Time limit in seconds for a run on a busy machine. A run that takes longer is considered to hang.
LIMIT = 120.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "torch._dynamo",  # optimizers import this in their first step
        "torch.utils.tensorboard",
        "senet_transfer.cli.arguments",
        "senet_transfer.engine.launch",
        "senet_transfer.engine.trainer",
    ]
)


@dataclasses.dataclass
class Work:
    """Small training run.

    Attributes:
        folder: Output folder of the run.
        words: Command-line arguments of the run, except OUTPUT_DIR.
    """

    folder: Path
    words: list[str]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def start(
        self, *flags: str, harm: Callable[[], None] | None = None, **environment: str
    ) -> multiprocessing.Process:
        """Start a process that calls ``harm`` to inject a failure and then runs the script.

        ``harm`` must be a module-level function, because it is pickled.
        """
        words = [*flags, *self.words, "OUTPUT_DIR", str(self.folder)]
        process = _forks.Process(target=_run, args=(words, str(self.log), harm, environment))
        process.start()
        return process

    def start_ranks(
        self, *flags: str, ranks: int = 2, harm: Callable[[], None] | None = None
    ) -> list[multiprocessing.Process]:
        """Start one process per rank, with the environment variables that torchrun sets."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        shared |= {"LOCAL_WORLD_SIZE": str(ranks)}
        return [
            self.start(*flags, harm=harm, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(ranks)
        ]

    def run(self, *flags: str, harm: Callable[[], None] | None = None) -> int:
        """Run the script until it ends, and return its exit status."""
        return end_of(self.start(*flags, harm=harm))

    def output(self) -> str:
        """Return everything that this run's processes have printed so far."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def wait_for(self, words: str, process: multiprocessing.Process, count: int = 1) -> None:
        """Wait until ``words`` occurs ``count`` times in the output or the process has ended."""
        until = time.monotonic() + LIMIT
        while self.output().count(words) < count and process.is_alive():
            assert time.monotonic() < until, f"{words!r} is not in:\n{self.output()[-3000:]}"
            time.sleep(0.01)

    def started_at(self) -> int:
        """Return the iteration at which the most recent process started training."""
        return int(re.findall(r"Starting training from iteration (\d+)", self.output())[-1])

    def last_iteration(self) -> int:
        """Return the iteration of the newest intact checkpoint, or -1 if there is none."""
        for name in history.checkpoints(self.folder):
            if not history.verify_checkpoint(self.folder / name):
                return load(self.folder / name)["iteration"]
        return -1

    def go_on(self, ranks: int = 1) -> None:
        """Resume the run, or restart it if there is no checkpoint, and train to the end.

        Assert that training continues at the iteration after the newest intact checkpoint.
        """
        last = self.last_iteration()
        flags = ["--resume"] if history.checkpoints(self.folder) else ["--overwrite"]
        if ranks == 1:
            statuses = [self.run(*flags)]
        else:
            statuses = [end_of(process) for process in self.start_ranks(*flags, ranks=ranks)]
        assert statuses == [0] * ranks, self.output()[-3000:]
        assert last + 1 == ITERATIONS or self.started_at() == last + 1
        self.assert_clean()

    def assert_clean(self) -> None:
        """Assert that all files of the run are complete and no temporary files are left."""
        assert not list(self.folder.glob(".*")), os.listdir(self.folder)
        names = [path.name for path in self.folder.glob("*.pth")]
        for name in names:
            path = self.folder / name
            assert history.sum_file(path).is_file()
            assert not history.verify_checkpoint(path)
        assert (self.folder / history.TAG).read_text() in names
        assert "MODEL:" in (self.folder / "config.yaml").read_text()
        for line in (self.folder / "metrics.json").read_text().splitlines():
            json.loads(line)

    def assert_ends_as(self, straight: "Work") -> None:
        """Assert that the final checkpoint is bitwise equal to that of an uninterrupted run."""
        found, expected = (load(work.folder / "model_final.pth") for work in (self, straight))
        # Ignore metadata, which describes the file that the model was loaded from.
        found.pop("senet_transfer"), expected.pop("senet_transfer")
        assert_same(found, expected)


def end_of(process: multiprocessing.Process, limit: float = LIMIT) -> int:
    """Wait for a process and return its exit status, which is negative if a signal killed it."""
    process.join(limit)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the run did not end within {limit:g} s")
    return process.exitcode


def _run(
    words: list[str], log: str, harm: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    os.setsid()
    # Use the default start method of a normal script.
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["train_net.py", *words]
    if harm:
        harm()
    runpy.run_path("tools/train_net.py", run_name="__main__")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
