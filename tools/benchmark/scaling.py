"""Benchmark ``scaling``: data-parallel training, peak memory, and time spent waiting for images."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmark.compare import Comparison, compare
from benchmark.inputs import draw_images
from benchmark.memory import peak_bytes
from benchmark.networks import (
    Options,
    detection_backbone,
    trained,
    training_step,
)
from benchmark.report import Amounts, Row
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.evaluation.classification import evaluate_classifier
from senet_transfer.models import create_classifier
from senet_transfer.models.image_classifier import wrap_classifier

# Batch size per process.
BATCH = 8


def measure_scaling(options: Options) -> Iterator[Row]:
    """Measure training with one and two processes, peak memory, and time waiting for images.

    Training is only measured on a CPU. The time waiting for images is measured in an evaluation.
    """
    if options.device == "cpu":
        yield _processes(options)
    yield from _memory(options)
    yield _evaluation(options)


def _processes(options: Options) -> Comparison:
    """Time training steps in one process and in two data-parallel processes.

    The number of images per process is the same in both cases.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        result = Path(folder) / "seconds.pt"
        mp.spawn(_process, (address, options.seconds, str(result)), nprocs=2)
        found = torch.load(result, weights_only=True)
    return Comparison(
        f"SE-ResNet-18, 224 px, training step of {BATCH} images per process, one thread each",
        "1 process",
        found,
        control="1 process again",
    )


def _process(rank: int, address: str, seconds: float, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = trained(create_classifier("se_resnet18"))
    images = torch.randn(BATCH, 3, 224, 224)
    together = training_step(DistributedDataParallel(model), images)
    if rank:  # Run each step together with rank 0 until rank 0 signals the end.
        while _broadcast_flag():
            together()
    else:

        def follow() -> None:
            _broadcast_flag(True)
            together()

        alone = training_step(model, images)
        found = compare(
            "",
            {"1 process": alone, "1 process again": alone, "2 processes": follow},
            baseline="1 process",
            control="1 process again",
            seconds=seconds,
        )
        _broadcast_flag(False)
        torch.save(found.seconds, result)
    dist.destroy_process_group()


def _broadcast_flag(flag: bool = False) -> bool:
    """Broadcast rank 0's flag to all ranks; on other ranks, the argument is ignored."""
    value = torch.tensor(flag)
    dist.broadcast(value, src=0)
    return bool(value)


def _memory(options: Options) -> Iterator[Row]:
    """Measure the detection backbone's peak memory in a training step, excluding weights."""
    models = {
        "ResNet-50": detection_backbone("resnet50", options.device),
        "SE-ResNet-50": detection_backbone("se_resnet50", options.device),
    }
    sizes = [(1, 320, 480), (2, 320, 480), (4, 320, 480), (1, 640, 960)]
    for name, model in models.items():
        peaks = {}
        for batch, height, width in sizes:
            step = training_step(model, torch.randn(batch, 3, height, width, device=options.device))
            step()
            peaks[f"{batch} x {height}x{width}"] = peak_bytes(step, options.device) / 1e6
        what = f"FPN backbone for detection, frozen norms, {name}: peak memory, without weights"
        yield Amounts(what, "MB", "1 x 320x480", peaks)


def _evaluation(options: Options) -> Amounts:
    """Measure the total time of an evaluation with one worker, and the time waiting for images."""
    model = wrap_classifier(create_classifier("se_resnet18", num_classes=2)).to(options.device)
    with tempfile.TemporaryDirectory() as name:
        # Use enough images to make the worker's start-up time (0.1 s) negligible.
        draw_images(Path(name), (500, 375), images=1024)
        view = EvalTransform(resize=256, crop=224)
        data = open_dataset(Path(name))
        found = evaluate_classifier(model.eval(), data, view, workers=1, quiet=True)
    return Amounts(
        f"Evaluation of SE-ResNet-18, 224 px, on {found.images} images of 500x375, one worker",
        "s",
        "all",
        {"all": found.seconds, "waiting for images": found.waited},
    )
