"""Benchmark of training ResNet-50 with and without SE: CUDA graph, eager and compiled steps."""

from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmark.gpu.measure import (
    Found,
    Settings,
    Step,
    amounts,
    autocast,
    captured,
    compare_steps,
    host_milliseconds,
    kernels_of,
    parameters_of,
    quotient,
    ratio_of,
)
from benchmark.gpu.remote import Remote, call_remote, start_all
from benchmark.gpu.targets import Result
from benchmark.memory import peak_bytes
from benchmark.networks import trained
from senet_transfer.layers.fused.functions import set_fused
from senet_transfer.models import create_classifier

PLAIN, FUSED, SE, TIMM, TIMM_SE = "plain", "fused plain", "SE", "timm resnet50", "timm seresnet50"
# A dry run uses networks with 18 layers.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    PLAIN: lambda depth: create_classifier(f"resnet{depth}", fused=False),
    "plain again": lambda depth: create_classifier(f"resnet{depth}", fused=False),
    FUSED: lambda depth: create_classifier(f"resnet{depth}"),
    SE: lambda depth: create_classifier(f"se_resnet{depth}"),
    TIMM: lambda depth: timm.create_model(f"resnet{depth}"),
    TIMM_SE: lambda depth: timm.create_model(f"seresnet{depth}"),
}
PAIRS = [(SE, FUSED), (SE, TIMM_SE), (PLAIN, TIMM)]

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def images_of(settings: Settings, batch: int = 64) -> torch.Tensor:
    """Return random images in the channels-last format."""
    side = settings.sized(224, 32)
    images = torch.randn(settings.sized(batch, 2), 3, side, side, device=settings.device)
    return images.contiguous(memory_format=torch.channels_last)


def training_step(
    settings: Settings,
    model: nn.Module,
    images: torch.Tensor,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    cache: bool = True,
) -> Step:
    """Return a function that resets gradients to None and runs a forward and a backward pass."""
    labels = torch.randint(1000, (len(images),), device=images.device)
    parameters = parameters_of(model)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        with autocast(settings, dtype, cache=cache):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return step


def build(settings: Settings, name: str) -> nn.Module:
    """Build a network in training mode, in the channels-last format."""
    network = NETWORKS[name](settings.sized(50, 18))
    return trained(network, settings.device).to(memory_format=torch.channels_last)


def measure_training(settings: Settings) -> Iterator[Found]:
    """Measure a ResNet-50 training step: time (eager and CUDA graph), memory and kernel count."""
    images = images_of(settings)
    models = {name: build(settings, name) for name in NETWORKS}
    yield from _as_graphs(settings, models, images, "bfloat16")
    set_fused(models[SE], "auto")
    steps = {name: training_step(settings, model, images) for name, model in models.items()}
    for step in steps.values():
        step()
    what = "Training step, bfloat16, channels last: {}"
    peaks = {name: peak_bytes(step, settings.device) / 1e6 for name, step in steps.items()}
    row = amounts(what.format("peak memory, without weights"), "MB", peaks)
    yield row, {"memory": quotient(peaks, SE, PLAIN)}
    found = {name: kernels_of(steps[name]) for name in (PLAIN, FUSED, SE, TIMM_SE)}
    counts = {name: float(count) for name, (_, count) in found.items()}
    results = {} if settings.dry_run else {"eager_kernels": Result(counts[SE])}
    yield amounts(what.format("kernels"), "kernels", counts), results
    busy = {name: time for name, (time, _) in found.items()}
    yield amounts(what.format("time that the GPU is busy"), "ms", busy), {}
    host = {name: host_milliseconds(step) for name, step in steps.items()}
    yield amounts(what.format("time until all kernels are launched"), "ms", host), {}
    eager = compare_steps(settings, what.format("eager"), steps, seconds=8, pairs=PAIRS)
    yield eager, {"eager": ratio_of(eager, SE), "eager_timm": ratio_of(eager, SE, TIMM_SE)}


def _as_graphs(
    settings: Settings, models: dict[str, nn.Module], images: torch.Tensor, precision: str
) -> Iterator[Found]:
    dtype = PRECISIONS[precision]
    for name in (FUSED, SE):  # as the engine does with SOLVER.COMPILE graph
        set_fused(models[name], settings.sized(True, "auto"))
    graphs = {
        name: captured(training_step(settings, model, images, dtype=dtype, cache=False))
        for name, model in models.items()
    }
    what = f"Training step, {precision}, channels last, as a CUDA graph"
    found = compare_steps(settings, what, graphs, seconds=8, calls=2, pairs=PAIRS)
    results = {}
    if precision == "bfloat16":
        results = {"graph": ratio_of(found, SE), "graph_fused": ratio_of(found, FUSED)}
    yield found, results


def measure_precisions(settings: Settings) -> Iterator[Found]:
    """Measure the ResNet-50 training step as a CUDA graph in float32 and float16."""
    images = images_of(settings)
    for precision in ("float16", "float32"):
        models = {name: build(settings, name) for name in NETWORKS}
        yield from _as_graphs(settings, models, images, precision)


def compiled_step(settings: Settings, name: str, precision: str) -> Step:
    """Compile a network, and return its training step."""
    model = torch.compile(build(settings, name), dynamic=False)
    return training_step(settings, model, images_of(settings), dtype=PRECISIONS[precision])


def measure_compiled(settings: Settings) -> Iterator[Found]:
    """Measure compiled training steps of ResNet-50, with and without SE.

    Each network is compiled in its own process.
    """
    names: dict[str, tuple[str, ...]] = {"bfloat16": (PLAIN, SE)}
    if settings.compiled == "all":
        every = (PLAIN, "plain again", FUSED, SE, TIMM_SE)
        names = dict.fromkeys(("bfloat16", "float16", "float32"), every)
    for precision, networks in names.items():
        builders = {name: partial(compiled_step, settings, name, precision) for name in networks}
        with start_all(settings, builders) as started:
            if PLAIN in started.steps:
                yield amounts(f"Compilation, {precision}", "s", started.seconds), {}
                yield from _compare_compiled(settings, precision, started.steps)
            started.check()


def _compare_compiled(
    settings: Settings, precision: str, remotes: dict[str, Remote]
) -> Iterator[Found]:
    what = f"Training step, {precision}, channels last, compiled"
    found = compare_steps(settings, what, remotes, seconds=6, pairs=PAIRS, timer=call_remote)
    wanted = precision == "bfloat16" and SE in remotes
    yield found, {"compiled": ratio_of(found, SE)} if wanted else {}
