"""Benchmark of basic GPU operations: copies, matrix products, launches and synchronisations."""

import time
from collections.abc import Iterator

import torch

from benchmark.compare import synchronise
from benchmark.gpu.measure import Found, Settings, timed
from benchmark.report import Amounts


def measure_card(settings: Settings) -> Iterator[Found]:
    """Measure the GPU's bandwidth and throughput, and the host time of launches and waits."""
    device = settings.device
    values = torch.empty(settings.sized(2**28, 2**10), device=device)
    other = torch.empty_like(values)
    timer = timed(settings.sized(10, 1))
    side = settings.sized(8192, 64)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):  # warm-up
        timer(lambda: other.copy_(values))
        timer(lambda: a @ b)
    rates = {
        "copy, GB/s read and written": 2 * values.nbytes / timer(lambda: other.copy_(values)) / 1e9,
        "product in bfloat16, TFLOP/s": 2 * side**3 / timer(lambda: a @ b) / 1e12,
    }
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (dry run)"
    yield Amounts(f"{name}: rates", "", "copy, GB/s read and written", rates), {}
    small = torch.ones(8, device=device)
    calls = settings.sized(2000, 20)
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        small.add_(1)
    launch = time.perf_counter() - start
    synchronise()
    start = time.perf_counter()
    for _ in range(calls // 10):
        small.add_(1).sum().item()
    wait = time.perf_counter() - start
    costs = {"launch": 1e6 * launch / calls, "two launches and a wait": 1e7 * wait / calls}
    yield Amounts(f"{name}: cost on the host", "us", "launch", costs), {}
