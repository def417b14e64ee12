"""Benchmark of training ResNet-110 and SE-ResNet-110 with this project's trainer."""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmark.compare import Comparison
from benchmark.gpu.measure import (
    Found,
    Settings,
    Step,
    amounts,
    compare_steps,
    kernels_of,
)
from benchmark.gpu.remote import call_remote, start_all
from benchmark.gpu.targets import Result
from benchmark.training import engine_loop, random_images
from senet_transfer.data.cifar.in_memory import save_images

BATCH = 128
# The engine writes metrics every 20 steps, so a call with 20 steps includes one write.
STEPS = 20
# The settings that the engine selects on a GPU.
AUTO = dict.fromkeys(
    ("SOLVER.AMP.ENABLED", "SOLVER.TF32", "MODEL.CLASSIFIER.CHANNELS_LAST", "CUDNN_BENCHMARK"),
    "auto",
)


@contextlib.contextmanager
def _loops(settings: Settings, candidates: dict[str, tuple[str, str]]) -> Iterator[dict[str, Step]]:
    """Yield a dict from candidate names to functions that run steps of this project's trainer.

    Args:
        settings: The settings of the GPU benchmark.
        candidates: The network name and the value of ``SOLVER.COMPILE`` of each candidate.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps: dict[str, Step] = {}
        for number, (name, (network, mode)) in enumerate(candidates.items()):
            data_file = folder / str(number) / "noise.safetensors"
            data_file.parent.mkdir()
            save_images(random_images(settings.sized(10_000, 64)), data_file, "noise")
            loop = engine_loop(
                network,
                data_file,
                batch_size=settings.sized(BATCH, 4),
                device=settings.device,
                steps=settings.sized(STEPS, 2),
                keys={**AUTO, "SOLVER.COMPILE": mode},
            )
            steps[name], _ = stack.enter_context(loop)
        yield steps


def _networks(settings: Settings) -> dict[str, str]:
    name = settings.sized("cifar_resnet110", "cifar_resnet8")
    return {"plain": name, "SE": f"se_{name}"}


def _rates(found: Comparison, settings: Settings) -> dict[str, float]:
    images = settings.sized(STEPS * BATCH, 2 * 4)
    return {name: images / statistics.median(times) for name, times in found.seconds.items()}


def _measure(settings: Settings, mode: str, *, seconds: float) -> Iterator[Found]:
    networks = _networks(settings)
    with _loops(settings, {name: (net, mode) for name, net in networks.items()}) as steps:
        what = f"CIFAR, {BATCH} images per step, engine with SOLVER.COMPILE {mode}"
        title = f"{what}: {STEPS} steps"
        found = compare_steps(settings, title, steps, seconds=seconds, min_rounds=6)
        yield found, {}
        rates = _rates(found, settings)
        results = {}
        if mode == "graph":
            results = {"cifar": Result(rates["plain"]), "cifar_se": Result(rates["SE"])}
        yield amounts(f"{what}: rate", "images/s", rates), results
        profiles = {name: kernels_of(step, calls=1) for name, step in steps.items()}
        counts = {name: count / STEPS for name, (_, count) in profiles.items()}
        yield amounts(f"{what}: kernels per step", "kernels", counts), {}


def measure_graph(settings: Settings) -> Iterator[Found]:
    """Measure CIFAR training with ``SOLVER.COMPILE graph``."""
    yield from _measure(settings, "graph", seconds=5)


def measure_eager(settings: Settings) -> Iterator[Found]:
    """Measure CIFAR training with ``SOLVER.COMPILE none``."""
    yield from _measure(settings, "none", seconds=8)


def _compiled_loop(settings: Settings, network: str) -> Step:
    stack = contextlib.ExitStack()
    steps = stack.enter_context(_loops(settings, {"step": (network, "default")}))["step"]

    def step() -> None:
        steps()

    step.stack = stack  # type: ignore[attr-defined]  # closed when the process ends
    return step


def measure_compiled(settings: Settings) -> Iterator[Found]:
    """Measure CIFAR training with ``SOLVER.COMPILE default``.

    The networks with and without SE are compiled at the same time, in separate processes.
    """
    builders = {
        name: partial(_compiled_loop, settings, network)
        for name, network in _networks(settings).items()
    }
    what = f"CIFAR, {BATCH} images per step, engine with SOLVER.COMPILE default"
    with start_all(settings, builders) as started:
        if "plain" in started.steps:
            title = f"{what}: {STEPS} steps"
            found = compare_steps(
                settings, title, started.steps, seconds=8, min_rounds=6, timer=call_remote
            )
            yield found, {}
            yield amounts(f"{what}: rate", "images/s", _rates(found, settings)), {}
            yield amounts(f"{what}: compilation and {2 * STEPS} steps", "s", started.seconds), {}
        started.check()
