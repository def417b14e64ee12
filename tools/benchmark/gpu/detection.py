"""Benchmark of training Faster R-CNN R50-FPN and its backbone, compared with Detectron2's code."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from benchmark.compare import synchronise
from benchmark.gpu.measure import (
    Found,
    Settings,
    Step,
    amounts,
    autocast,
    captured,
    compare_steps,
    keep_finite,
    kernels_of,
    parameters_of,
    quotient,
    ratio_of,
)
from benchmark.gpu.targets import Result
from benchmark.memory import peak_bytes
from benchmark.networks import detection_backbone, trained
from senet_transfer.config.load import load_config
from senet_transfer.engine.solver import build_optimizer
from senet_transfer.engine.train_step import StepTrainer

PLAIN, FUSED, SE, DETECTRON2 = "plain", "fused plain", "SE", "Detectron2"
# The network, the option `fused` and whether Detectron2's own backbone and trainer are used.
DETECTORS: dict[str, tuple[bool, str | bool, bool]] = {
    PLAIN: (False, False, False),
    "plain again": (False, False, False),
    SE: (True, "auto", False),
    DETECTRON2: (False, "auto", True),
    FUSED: (False, "auto", False),
}
# Height and width of the images in each batch. All images in a batch have the same shape.
SHAPES = ((800, 1066), (800, 1200), (1200, 800), (800, 1333), (1066, 800), (800, 1216))
OBJECTS = 7  # per image, as in COCO
ROUNDS = 50  # steps of each detector, if there is enough time
_AFTER = 5.0  # seconds reserved for the measurements after the comparison
READ_PERIOD = 20  # number of steps after which the losses are read, as in training


def _backbone_step(
    settings: Settings, model: nn.Module, images: torch.Tensor, *, cache: bool = True
) -> Step:
    parameters = parameters_of(model)
    gradients: list[torch.Tensor] = []

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        with autocast(settings, torch.float16, cache=cache):
            outputs = list(model(images).values())
        if not gradients:
            gradients.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.backward(outputs, gradients)

    return step


def measure_backbone(settings: Settings) -> Iterator[Found]:
    """Measure the forward and backward pass of the FPN backbone with frozen norms.

    The GPU time, the number of kernels, the peak memory and the step time are measured.
    """
    images = torch.randn(settings.sized((2, 3, 800, 1216), (1, 3, 32, 64)), device=settings.device)
    name = settings.sized("resnet50", "resnet18")
    build = {
        PLAIN: partial(detection_backbone, name, settings.device, fused=False),
        "plain again": partial(detection_backbone, name, settings.device, fused=False),
        FUSED: partial(detection_backbone, name, settings.device),
        SE: partial(detection_backbone, f"se_{name}", settings.device),
    }
    models = {name: keep_finite(function()) for name, function in build.items()}
    steps = {name: _backbone_step(settings, model, images) for name, model in models.items()}
    for step in steps.values():
        step()
    what = "FPN backbone, frozen norms, AMP: {}"
    found = {name: kernels_of(step, calls=5) for name, step in steps.items()}
    busy = {name: time for name, (time, _) in found.items()}
    yield (
        amounts(what.format("time that the GPU is busy"), "ms", busy),
        {"fpn_busy": quotient(busy, SE, PLAIN)},
    )
    counts = {name: float(count) for name, (_, count) in found.items()}
    results = {} if settings.dry_run else {"fpn_kernels": Result(counts[SE])}
    yield amounts(what.format("kernels"), "kernels", counts), results
    peaks = {name: peak_bytes(step, settings.device) / 1e6 for name, step in steps.items()}
    yield amounts(what.format("peak memory, without weights"), "MB", peaks), {}
    yield (
        compare_steps(settings, what.format("eager"), steps, seconds=4, pairs=[(SE, FUSED)]),
        {},
    )
    last = torch.channels_last
    graphs = {
        name: captured(_backbone_step(settings, model, images, cache=False))
        for name, model in models.items()
    }
    graphs |= {
        f"{name}, channels last": captured(
            _backbone_step(
                settings,
                copy.deepcopy(models[name]).to(memory_format=last),
                images.to(memory_format=last),
                cache=False,
            )
        )
        for name in (PLAIN, SE)
    }
    pairs = [(SE, FUSED), (f"{SE}, channels last", f"{PLAIN}, channels last")]
    title = what.format("as a CUDA graph")
    yield compare_steps(settings, title, graphs, seconds=4, pairs=pairs), {}


def recipe(settings: Settings, name: str) -> CfgNode:
    """Return the config for a detector with random weights."""
    se, fused, theirs = DETECTORS[name]
    cfg = load_config("faster_rcnn_se_r50" if se else "faster_rcnn_r50")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = settings.device, ""
    cfg.MODEL.SE.FUSED = fused
    if theirs:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.SOLVER.BASE_LR = 1e-4  # The weights should hardly change during the benchmark.
    if settings.dry_run:
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
        cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    return cfg


def batch(settings: Settings, shape: tuple[int, int], seed: int) -> list[dict]:
    """Return a batch of random images in pinned memory, with random objects."""
    draw = torch.Generator().manual_seed(seed)
    height, width = shape if not settings.dry_run else (shape[0] // 12, shape[1] // 12)
    images = []
    for _ in range(settings.sized(16, 2)):
        instances = Instances((height, width))
        low = torch.rand(OBJECTS, 2, generator=draw) * 0.7
        high = low + 0.05 + 0.25 * torch.rand(OBJECTS, 2, generator=draw)
        instances.gt_boxes = Boxes(torch.cat([low, high], 1) * torch.tensor([width, height] * 2))
        instances.gt_classes = torch.randint(80, (OBJECTS,), generator=draw)
        pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=draw)
        if not settings.dry_run:
            pixels = pixels.pin_memory()
        images.append(
            {"image": pixels, "instances": instances, "height": height, "width": width}
            | {"file_name": f"{seed}.jpg", "image_id": seed}
        )
    return images


def trainer(settings: Settings, name: str, batches: list[list[dict]]) -> TrainerBase:
    """Build this project's or Detectron2's trainer for a detector.

    The trainer repeats the given batches.
    """
    cfg = recipe(settings, name)
    model = keep_finite(trained(build_model(cfg), settings.device))
    if DETECTORS[name][2]:
        optimizer = build_detectron2_optimizer(cfg, model)
        if settings.dry_run:
            return SimpleTrainer(model, cycle(batches), optimizer)
        return AMPTrainer(model, cycle(batches), optimizer, precision=torch.float16)
    return StepTrainer(
        model,
        cycle(batches),
        build_optimizer(cfg, model),
        dtype=settings.sized("float16", None),
        reads_after=settings.sized(_reads_after, None),
    )


def _reads_after(iteration: int) -> bool:
    return (iteration + 1) % READ_PERIOD == 0


def training_step(own: TrainerBase) -> Callable[[], None]:
    """Return a function that runs one training step, including the optimizer."""
    own.iter = 0
    storage = EventStorage()

    def step() -> None:
        torch.manual_seed(own.iter)
        with storage:
            storage.iter = own.iter
            own.run_step()
        own.iter += 1

    return step


def measure_detector(settings: Settings) -> Iterator[Found]:
    """Measure the time of :data:`ROUNDS` training steps of each detector, and the peak memory."""
    batches = [batch(settings, shape, seed) for seed, shape in enumerate(SHAPES)]
    batches = batches[: settings.sized(len(batches), 1)]
    what = "Faster R-CNN R50-FPN, AMP, training step: {}"
    steps = {name: training_step(trainer(settings, name, batches)) for name in DETECTORS}
    # The first steps with each shape allocate memory and choose convolution algorithms.
    for _ in batches:
        start = time.monotonic()
        for step in steps.values():
            step()
        synchronise()
        seconds = time.monotonic() - start
    # Subtract the three rounds that warm up the comparison.
    rounds = int((settings.left() - _AFTER) / seconds) - 3 if settings.left() < math.inf else ROUNDS
    found = compare_steps(
        settings,
        what.format("time"),
        steps,
        seconds=0,
        min_rounds=max(min(rounds, ROUNDS), 2),
        pairs=[(SE, FUSED)],
    )
    yield (
        found,
        {"detector": ratio_of(found, SE), "detector_plain": ratio_of(found, PLAIN, DETECTRON2)},
    )
    peaks = {name: peak_bytes(steps[name], settings.device) / 1e6 for name in (PLAIN, FUSED, SE)}
    yield amounts(what.format("peak memory, without weights"), "MB", peaks), {}
