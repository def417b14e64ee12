"""Parts of the GPU benchmark, each in its own process with a time limit.

An error in a kernel makes CUDA unusable for the rest of a process, and compilation can take a very
long time. Therefore, each part runs in its own process, which is stopped at the part's time limit.
All rows reported by then are kept.
"""

import importlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmark.gpu.measure import Settings
from benchmark.gpu.targets import Result, as_text, table
from benchmark.report import machine
from senet_transfer.errors import RunError, UserError
from senet_transfer.utils.atomic_io import write_json


@dataclass(frozen=True)
class Part:
    """Group of measurements in the GPU benchmark.

    Attributes:
        module: Module in this package.
        function: Function that yields the rows of the printed table, and :class:`Result` objects
            for the values that are compared with targets.
        seconds: Maximum time in seconds.
    """

    module: str
    function: str
    seconds: float


# The most informative parts come first, because later ones may find no time left.
PARTS = {
    "card": Part("card", "measure_card", 25),
    "training": Part("classifier", "measure_training", 110),
    "detector": Part("detection", "measure_detector", 115),
    "cifar-graph": Part("cifar", "measure_graph", 45),
    "backbone": Part("detection", "measure_backbone", 40),
    "inference": Part("inference", "measure_inference", 40),
    "compiled": Part("classifier", "measure_compiled", 110),
    "images": Part("images", "measure_images", 40),
    "cifar-compiled": Part("cifar", "measure_compiled", 120),
    "cifar-eager": Part("cifar", "measure_eager", 30),
    "precisions": Part("classifier", "measure_precisions", 60),
}
# Modules that the parts import, which must not initialise CUDA.
_MODULES = sorted({part.module for part in PARTS.values()})
# A part is not started if less time than this is left.
_LEAST = 12.0


def run(
    names: Sequence[str] = (),
    *,
    output: str | None = None,
    command: str = "",
    budget: float = 340.0,
    compiled: str = "bf16",
    dry_run: bool = False,
) -> None:
    """Run parts of the GPU benchmark, print each row when it is available, and save all rows.

    Args:
        names: The parts to run; all by default.
        output: The JSON file, which is written after each row.
        command: The command line, for the JSON file.
        budget: The time for all parts together, in seconds.
        compiled: The compiled training steps of ResNet-50 to measure: "bf16" (with and without SE,
            in bfloat16) or "all" (all networks in all precisions, which needs a larger budget).
        dry_run: If True, check the code on a CPU, with tiny networks and images. No value is
            compared with its target.

    Raises:
        UserError: If there is no GPU, and this is not a dry run.
        RunError: At the end, if a part failed or ran out of time.
    """
    # A process that has initialised CUDA cannot be forked. With this variable, libraries that call
    # torch.cuda.is_available() do not initialise it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if not dry_run and not _has_gpu():
        raise UserError(
            "The GPU benchmark requires a CUDA GPU, but torch.cuda.is_available() is False. To "
            "check the benchmark's code on a CPU, with tiny networks and images, use --dry-run."
        )
    # Otherwise, the profiler logs each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    signal.signal(signal.SIGTERM, _stop)  # also stop the process of the current part
    start = time.monotonic()
    settings = Settings(dry_run=dry_run, compiled=compiled)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max((os.cpu_count() or 1) // 2, 1)))
    for module in _MODULES:
        importlib.import_module(f"benchmark.gpu.{module}")
    report = Report(output, command, dry_run)
    for name in names or PARTS:
        left = math.inf if dry_run else budget - (time.monotonic() - start)
        if left < _LEAST:
            report.problem(name, "not started: out of time")
            continue
        seconds = left if dry_run or compiled == "all" else min(PARTS[name].seconds, left)
        run_part(name, replace(settings, deadline=time.monotonic() + seconds), report)
    report.finish(time.monotonic() - start)


def _has_gpu() -> bool:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(torch.cuda.is_available)


def _stop(*_: object) -> None:
    raise SystemExit(143)


class Report:
    """Report of a benchmark, printed and saved incrementally while the benchmark runs."""

    def __init__(self, output: str | None, command: str, dry_run: bool):
        self.output, self.dry_run = output, dry_run
        self.results: dict[str, Result] = {}
        self.problems: list[str] = []
        self.content: dict[str, Any] = {
            "command": command,
            "dry_run": dry_run,
            "machine": {},
            "rows": [],
            "notes": {},
            "targets": table({}),
        }

    def add(self, part: str, row: dict[str, Any], text: str, results: dict[str, Result]) -> None:
        """Print a measurement as text, and save it as a row of the report.

        In a dry run, the results are not compared with the targets.
        """
        print(text, flush=True)
        self.content["rows"].append({"part": part, **row})
        if not self.dry_run:
            self.results |= results
        self._save()

    def machine(self, found: dict[str, Any]) -> None:
        """Save the description of the machine."""
        self.content["machine"] = found

    def problem(self, part: str, text: str) -> None:
        """Print and save the reason why a part of the benchmark is incomplete."""
        self.problems.append(part)
        self.note(part, text)

    def note(self, part: str, text: str) -> None:
        """Print and save a note about a part of the benchmark, such as a reason for skipping it."""
        print(f"{part}: {text}", flush=True)
        self.content["notes"][part] = text
        self._save()

    def finish(self, seconds: float) -> None:
        """Print a table that compares the results with the performance targets.

        Raises:
            RunError: If a part of the benchmark is incomplete.
        """
        self.content["seconds"] = seconds
        self._save()
        print(as_text(self.content["targets"]), flush=True)
        print(f"{seconds:.0f} seconds")
        if self.problems:
            names = ", ".join(self.problems)
            raise RunError(f"Parts of the benchmark are incomplete: {names}. See the errors above.")

    def _save(self) -> None:
        self.content["targets"] = table(self.results)
        if self.output:
            write_json(self.output, self.content)


def run_part(name: str, settings: Settings, report: Report) -> None:
    """Run a part of the benchmark in a separate process, and report the results.

    The process is stopped at ``settings.deadline``, even if the part is incomplete.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(there, name, settings))
    process.start()
    there.close()
    try:
        _receive(here, name, settings, report)
    finally:
        _end(process)


def _receive(connection: Connection, name: str, settings: Settings, report: Report) -> None:
    while True:
        left = settings.left()
        if not connection.poll(None if left == math.inf else max(left, 0)):
            report.problem(name, f"out of time at {PARTS[name].seconds:g} seconds or the budget")
            return
        try:
            kind, *values = connection.recv()
        except EOFError:
            report.problem(name, "its process has ended")
            return
        if kind == "machine":
            report.machine(*values)
        elif kind == "row":
            report.add(name, *values)
        else:
            if kind == "problem":
                report.problem(name, *values)
            elif kind == "unavailable":
                report.note(name, *values)
            return


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """Kill the process that runs a part of the benchmark, and its child processes."""
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # The process does not lead a group yet, or has already ended.
            process.kill()
    process.join()


def _serve(connection: Connection, name: str, settings: Settings) -> None:
    os.setsid()
    part = PARTS[name]
    try:
        measure = getattr(importlib.import_module(f"benchmark.gpu.{part.module}"), part.function)
        for row, results in measure(settings):
            connection.send(("row", row.as_dict(), str(row), results))
        connection.send(("machine", machine()))
        connection.send(("end",))
    except UserError as error:
        connection.send(("unavailable", f"not available: {error}"))
    except Exception:
        connection.send(("problem", traceback.format_exc()))
