"""Benchmark ``detector``: training step time and memory of Faster R-CNN with and without SE."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from benchmark.compare import compare
from benchmark.memory import peak_bytes
from benchmark.networks import Options, trained
from benchmark.report import Amounts, Row
from senet_transfer.config import get_senet_config

HEIGHT, WIDTH, IMAGES, PROPOSALS, CLASSES = 320, 480, 2, 128, 80


def recipe(se: bool) -> CfgNode:
    """Return a config for Faster R-CNN R50-FPN with frozen norms, stem and res2."""
    cfg = get_senet_config()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_senet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = PROPOSALS
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.SE.ENABLED = se
    cfg.MODEL.WEIGHTS = ""
    return cfg


def build(se: bool, device: str) -> nn.Module:
    """Build the detector with random weights and fixed proposals.

    If the proposals were predicted with random weights, the cost of the ROI heads would differ
    between networks by more than the cost of the gates.
    """
    cfg = recipe(se)
    cfg.MODEL.DEVICE = device
    model = trained(build_model(cfg), device)
    model.proposal_generator.predict_proposals = lambda *_: proposals(device)
    return model


def boxes(count: int, device: str, seed: int) -> Boxes:
    """Return random boxes in pixels."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.tensor([WIDTH, HEIGHT])
    low = torch.rand(count, 2, generator=draw) * 0.7 * size
    high = low + (0.05 + 0.25 * torch.rand(count, 2, generator=draw)) * size
    return Boxes(torch.cat([low, high], 1).to(device))


def proposals(device: str) -> list[Instances]:
    """Return random proposals that are the same for all networks and steps."""
    found = []
    for image in range(IMAGES):
        instances = Instances((HEIGHT, WIDTH))
        instances.proposal_boxes = boxes(1000, device, seed=image)
        instances.objectness_logits = torch.zeros(1000, device=device)
        found.append(instances)
    return found


def batch(device: str) -> list[dict]:
    """Return a batch of images with ten random objects each."""
    inputs = []
    for image in range(IMAGES):
        instances = Instances((HEIGHT, WIDTH))
        instances.gt_boxes = boxes(10, device, seed=100 + image)
        instances.gt_classes = torch.arange(10, device=device)
        pixels = torch.full((3, HEIGHT, WIDTH), 40 * (image + 1), dtype=torch.uint8)
        inputs.append({"image": pixels, "instances": instances})
    return inputs


def training_step(model: nn.Module, device: str) -> Callable[[], None]:
    """Return a function that runs a forward and backward pass, always with the same random seed."""
    inputs = batch(device)

    def step() -> None:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=False)
        sum(model(inputs).values()).backward()

    return step


def measure_detector(options: Options) -> Iterator[Row]:
    """Measure the step time and peak memory of Faster R-CNN R50-FPN with fixed proposals."""
    names = {"plain": False, "plain again": False, "SE": True}
    with _quiet():
        models = {name: build(se, options.device) for name, se in names.items()}
        steps = {name: training_step(model, options.device) for name, model in models.items()}
        yield compare(
            f"Faster R-CNN R50-FPN, {IMAGES} x {HEIGHT}x{WIDTH}: forward and backward",
            steps,
            baseline="plain",
            control="plain again",
            seconds=2 * options.seconds,
            warm_up=1,
            min_rounds=6,
            profile=options.profile,
        )
        peaks = {name: peak_bytes(steps[name], options.device) / 1e6 for name in ("plain", "SE")}
    yield Amounts(
        "Faster R-CNN R50-FPN: peak memory of a step, without weights", "MB", "plain", peaks
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Provide the ``EventStorage`` to which Detectron2's modules log during training."""
    from detectron2.utils.events import EventStorage

    with EventStorage():
        yield
