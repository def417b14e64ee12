"""Benchmarks ``engine`` and ``augment``: overhead of the training loop and cost of augmentation.

The engine is :class:`~senet_transfer.engine.trainer.Trainer` with all hooks. It writes to the log
more often than in a normal run. It is compared with a plain PyTorch loop that uses the same
batches, loss and optimizer.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.transforms.v2.functional import normalize

from benchmark.compare import Comparison, compare
from benchmark.networks import Options
from benchmark.report import Amounts, Row
from senet_transfer.config.load import load_config
from senet_transfer.data.build import use_classification_datasets
from senet_transfer.data.cifar.in_memory import ImageArrays, load_images, save_images
from senet_transfer.data.cifar.loader import CifarTrainLoader
from senet_transfer.data.cifar.transforms import CifarAugment
from senet_transfer.engine.numerics import apply_settings, resolve_auto
from senet_transfer.engine.run_checks import check_run
from senet_transfer.engine.trainer import Trainer
from senet_transfer.layers.cutout import cut_out
from senet_transfer.models import create_classifier
from senet_transfer.preprocessing import CIFAR10
from senet_transfer.utils.private_api import set_write_period

STEPS = 2

_RATE, _DECAY = 0.1, 1e-4


def random_images(images: int) -> ImageArrays:
    """Return random images of ten classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageArrays(pixels, torch.arange(images) % 10, [str(n) for n in range(10)], "noise")


def plain_loop(
    model: nn.Module, data: ImageArrays, *, batch_size: int, device: str
) -> Callable[[], None]:
    """Return a function that runs :data:`STEPS` training steps in plain PyTorch."""
    model = model.train().to(device)
    options = {"momentum": 0.9, "weight_decay": _DECAY, "foreach": True}
    optimizer = torch.optim.SGD(model.parameters(), _RATE, **options)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [32_000, 48_000])
    loader = iter(
        CifarTrainLoader(data, batch_size=batch_size, seed=0, augment=CifarAugment(), device=device)
    )
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) for values in (CIFAR10.mean, CIFAR10.std)
    )

    def steps() -> None:
        for _ in range(STEPS):
            batch = next(loader)
            optimizer.zero_grad()
            loss = F.cross_entropy(model((batch["image"] - mean) / std), batch["label"])
            loss.backward()
            optimizer.step()
            schedule.step()

    return steps


@contextlib.contextmanager
def engine_loop(
    name: str,
    data_file: Path,
    *,
    batch_size: int,
    device: str,
    steps: int = STEPS,
    keys: Mapping[str, object] | None = None,
) -> Iterator[tuple[Callable[[], None], Trainer]]:
    """Yield a function that runs training steps, and the ``Trainer`` that the function uses.

    Args:
        name: Name of the network.
        data_file: File of 32x32 training images, as written by ``senet data cifar``. For other
            images, ``keys`` must contain the input settings. Logs are written to the folder that
            contains this file.
        batch_size: Number of images per step.
        device: Device on which the network is trained.
        steps: Number of steps per call. Metrics are written in the last step of each call.
        keys: Additional config keys and their values.
    """
    words = {**_keys(name, data_file), **(keys or {})}
    cfg = load_config("", [str(word) for item in words.items() for word in item])
    cfg.MODEL.DEVICE, cfg.SOLVER.IMS_PER_BATCH = device, batch_size
    cfg.OUTPUT_DIR = str(data_file.parent)
    check_run(cfg, eval_only=False, resume=False)
    resolve_auto(cfg)
    apply_settings(cfg)
    use_classification_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.iter, trainer.max_iter = 0, cfg.SOLVER.MAX_ITER
    for writer in trainer.periodic_writers:
        set_write_period(writer, steps)

    def run() -> None:
        with trainer.storage:  # Each loop has its own event storage.
            for _ in range(steps):
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1

    trainer.storage = EventStorage(0)
    with trainer.storage:
        trainer.before_train()
    yield run, trainer
    with trainer.storage:
        for writer in trainer.periodic_writers:
            writer.after_train()


def _keys(name: str, data_file: Path) -> dict[str, object]:
    image = "INPUT.CLASSIFICATION"
    return {
        "MODEL.META_ARCHITECTURE": "ImageClassifier",
        "MODEL.BACKBONE.NAME": "build_senet_backbone",
        "MODEL.BACKBONE.ARCH": name,
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.PIXEL_MEAN": list(CIFAR10.mean),
        "MODEL.PIXEL_STD": list(CIFAR10.std),
        "INPUT.FORMAT": "RGB",
        "DATASETS.TRAIN": (str(data_file),),
        "DATASETS.TEST": (),
        f"{image}.AUGMENT": "pad_crop",
        f"{image}.CROP": 32,
        f"{image}.TEST_RESIZE": 32,
        f"{image}.TEST_CROP": 32,
        "SOLVER.BASE_LR": _RATE,
        "SOLVER.WEIGHT_DECAY": _DECAY,
        "SOLVER.WEIGHT_DECAY_NORM": _DECAY,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.MAX_ITER": 64_000,
        "SOLVER.STEPS": (32_000, 48_000),
        "SOLVER.CHECKPOINT_PERIOD": 64_000,
        "SEED": 0,
    }


def measure_engine(options: Options) -> Iterator[Row]:
    """Compare this project's trainer with a plain PyTorch loop that trains the same ResNet-110."""
    name = "cifar_resnet110"
    # The batch size in the recipe, 128, would take minutes on a CPU. A smaller batch size increases
    # the relative overhead of the engine.
    batch_size = 128 if options.device == "cuda" else 32
    with tempfile.TemporaryDirectory() as folder:
        data_file = Path(folder) / "noise.safetensors"
        save_images(random_images(2048), data_file, "noise")
        device = options.device
        plain = {
            key: plain_loop(
                create_classifier(name, 10),
                load_images(data_file),
                batch_size=batch_size,
                device=device,
            )
            for key in ("plain loop", "plain loop again")
        }
        with engine_loop(name, data_file, batch_size=batch_size, device=device) as (steps, _):
            found = compare(
                f"Training ResNet-110, {batch_size} images per step: {STEPS} steps",
                {**plain, "this engine": steps},
                baseline="plain loop",
                control="plain loop again",
                seconds=options.seconds,
            )
    yield found
    yield _images_a_second(found, STEPS * batch_size)


def measure_augment(options: Options) -> Iterator[Row]:
    """Time the sampling, augmentation and normalisation of batches of 128 CIFAR-sized images."""
    data, batches = random_images(50_000), 10

    def augmented(augment: CifarAugment) -> Callable[[], None]:
        loader = CifarTrainLoader(
            data, batch_size=128, seed=0, augment=augment, device=options.device
        )
        iterations = count()

        def work() -> None:
            for _ in range(batches):
                batch = loader.batch(next(iterations))
                images = normalize(batch["image"].float(), CIFAR10.mean, CIFAR10.std)
                if augment.cutout:
                    cut_out(images, batch["cutout"], augment.cutout)

        return work

    candidates = {
        "zeros": augmented(CifarAugment()),
        "zeros, Cutout": augmented(CifarAugment(cutout=16)),
        "reflection": augmented(CifarAugment(padding="reflect")),
    }
    what = f"Augmentation of {batches} batches of 128 images"
    found = compare(what, candidates, baseline="zeros", seconds=options.seconds / 2)
    yield found
    yield _images_a_second(found, batches * 128)


def _images_a_second(found: Comparison, images: int) -> Amounts:
    rates = {name: images / statistics.median(values) for name, values in found.seconds.items()}
    return Amounts(found.what, "images/s", found.baseline, rates)
