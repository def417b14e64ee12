"""Benchmark of SE-ResNet-50 training from JPEG files: throughput and time waiting for data."""

import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmark.gpu.cifar import AUTO
from benchmark.gpu.measure import Found, Settings, compare_steps
from benchmark.inputs import draw_images
from benchmark.report import Amounts
from benchmark.training import engine_loop
from senet_transfer.data.classification.loader import build_classification_train_loader
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import TrainTransform

BATCH, STEPS = 128, 20


def measure_images(settings: Settings) -> Iterator[Found]:
    """Measure the throughput of training and data loading for images of 256x256 pixels."""
    batch, steps = settings.sized((BATCH, STEPS), (4, 2))
    size = settings.sized(224, 32)
    workers = settings.sized(max(len(os.sched_getaffinity(0)) - 2, 1), 1)
    what = f"Training from JPEG files of 256x256, {size} px, {workers} workers"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        draw_images(folder, (256, 256), images=settings.sized(1024, 16))
        rates = {"loader": _loader_rate(settings, folder, batch, workers, size)}
        options = {
            **AUTO,
            "INPUT.CLASSIFICATION.AUGMENT": "region",
            "INPUT.CLASSIFICATION.CROP": size,
            "INPUT.CLASSIFICATION.TEST_RESIZE": 256,
            "INPUT.CLASSIFICATION.TEST_CROP": size,
            "DATALOADER.NUM_WORKERS": workers,
        }
        loop = engine_loop(
            settings.sized("se_resnet50", "se_resnet18"),
            folder,
            batch_size=batch,
            device=settings.device,
            steps=steps,
            keys=options,
        )
        with loop as (run, trainer):
            run()  # The first steps start the workers.
            timer = trainer.timer
            before = timer.seconds, trainer.waited
            title = f"{what}: {steps} steps of {batch} images"
            found = compare_steps(settings, title, {"plain": run}, seconds=8, min_rounds=4)
            share = (trainer.waited - before[1]) / (timer.seconds - before[0])
    yield found, {}
    rates["training"] = batch * steps / found.as_dict()["candidates"]["plain"]["median_s"]
    yield Amounts(f"{what}: rate", "images/s", "loader", rates), {}
    percent = {"waiting for images": 100 * share}
    yield Amounts(f"{what}: share of the time", "%", "waiting for images", percent), {}


def _loader_rate(settings: Settings, folder: Path, batch: int, workers: int, size: int) -> float:
    """Return the throughput of the data loader in images per second."""
    loader = build_classification_train_loader(
        open_dataset(folder),
        batch_size=batch,
        transform=TrainTransform(size=size),
        seed=0,
        num_workers=workers,
        pin_memory=not settings.dry_run,
    )
    count = settings.sized(10 * workers, 4)
    batches = iter(loader)
    for _ in islice(batches, settings.sized(2 * workers, 2)):
        pass
    start = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return batch * count / (time.perf_counter() - start)
