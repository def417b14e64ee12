"""Training steps of the GPU benchmark that are compiled in parallel, each in a separate process.

After compilation, the steps are timed one at a time, so that concurrent steps do not distort the
measured times.
"""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from benchmark.gpu.measure import Settings, Step, timed

# Seconds before the deadline that are reserved for the comparison.
_RESERVE = 12.0


class RemoteError(Exception):
    """Error or timeout in a separate process that builds and runs a benchmark step."""


class Remote:
    """Benchmark step in another process. A call runs the step and returns its time in seconds."""

    def __init__(self, connection: Connection, settings: Settings):
        self.connection, self.settings = connection, settings

    def receive(self, reserve: float = 0.0) -> float:
        """Wait for the next number sent by the other process, and return it."""
        wait = max(self.settings.left() - reserve, 0)
        if not self.connection.poll(wait if wait < 1e6 else None):
            raise RemoteError("out of time")
        try:
            found = self.connection.recv()
        except EOFError:
            raise RemoteError("the process has ended") from None
        if isinstance(found, str):
            raise RemoteError(found)
        return found

    def __call__(self) -> float:
        self.connection.send("run")
        return self.receive()


def call_remote(step: Step) -> float:
    """Run a step in another process, and return its time in seconds, measured in that process."""
    return step()  # type: ignore[return-value]


def _serve(connection: Connection, build: Callable[[], Step], settings: Settings) -> None:
    try:
        if settings.dry_run:  # Compilation on a CPU would take minutes.
            torch.compiler.set_stance("force_eager")
            torch.set_num_threads(1)
        start = time.perf_counter()
        step = build()
        step()
        step()
        connection.send(time.perf_counter() - start)
        timer = timed(1)
        while connection.recv():
            connection.send(timer(step))
    except Exception:
        connection.send(traceback.format_exc())


@dataclass
class Started:
    """Steps of the benchmark that have been built in other processes.

    Attributes:
        steps: Steps that are ready to be called.
        seconds: Time taken to build each step.
        errors: Errors of the steps that failed or could not be built in time.
    """

    steps: dict[str, Remote] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, RemoteError] = field(default_factory=dict)

    def check(self) -> None:
        """Raise RemoteError if a benchmark step failed to build or was not built in time."""
        if self.errors:
            text = "; ".join(f"{name}: {error}" for name, error in self.errors.items())
            raise RemoteError(text)


@contextlib.contextmanager
def start_all(settings: Settings, builders: Mapping[str, Callable[[], Step]]) -> Iterator[Started]:
    """Build several training steps for the benchmark in parallel, each in a separate process.

    CUDA must not be initialised in this process.

    Args:
        settings: The settings of the GPU benchmark.
        builders: Functions that build the steps, keyed by step name.

    Yields:
        The steps that were built, and the errors of those that failed.
    """
    context = multiprocessing.get_context("fork")
    started, remotes, processes = Started(), {}, []
    try:
        for name, build in builders.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, build, settings))
            process.start()
            there.close()
            processes.append(process)
            remotes[name] = Remote(here, settings)
        for name, remote in remotes.items():
            try:
                started.seconds[name] = remote.receive(_RESERVE)
                started.steps[name] = remote
            except RemoteError as error:
                started.errors[name] = error
        yield started
    finally:
        for process in processes:
            process.kill()
            process.join()
