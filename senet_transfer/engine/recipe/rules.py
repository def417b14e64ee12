"""Rules that choose a training recipe. The table in docs/recipes.md lists them with their sources.

The rules are pure functions of the properties of the data and the hardware.
"""

import math
from typing import Any, NamedTuple

from senet_transfer.engine.recipe.facts import DataProperties, MachineProperties

# Minimum GPU memory in GB for choosing SE-ResNet-50 instead of SE-ResNet-18.
LARGE_GPU = 6

# Number of images to process in training, and minimum and maximum number of epochs. The keys are
# the task and whether training starts from pretrained weights.
SCHEDULES = {
    ("detection", True): (12_000, 12, 100),
    ("detection", False): (36_000, 36, 300),
    ("classification", True): (100_000, 5, 30),
    ("classification", False): (300_000, 20, 90),
}
# Maximum number of images to process on a CPU, and the minimum number of epochs.
CPU_SCHEDULES = {"detection": (6_000, 3), "classification": (20_000, 3)}

# Limits for the shorter side of a detector's images, on a GPU and on a CPU.
_SIDES, _CPU_SIDES = (320, 800), (224, 320)
# Limits for a classifier's crop size, on a GPU and on a CPU.
_CROPS, _CPU_CROPS = (32, 224), (32, 128)
# Target for the 10th percentile of object sizes in pixels: the smallest anchor of an FPN.
_SMALLEST_ANCHOR = 32
# Number of evaluations during training.
_EVALUATIONS = 10

# Learning rates per image in a batch, as in the base configs.
_RATES = {
    ("detection", True): 0.00125,
    ("detection", False): 0.000125,
    ("classification", True): 0.0003125,
    ("classification", False): 0.0000625,
}


class Choice(NamedTuple):
    """Value of a config key, and the reason for it."""

    key: str
    value: Any
    reason: str


def backbone(machine: MachineProperties) -> tuple[str, str]:
    """Return a backbone and its published ImageNet weights, chosen according to the GPU memory."""
    if machine.gpu_memory >= LARGE_GPU:
        return "se_resnet50", "cadene/se_resnet50"
    return "se_resnet18", "timm_legacy/seresnet18"


def choose(
    data: DataProperties, machine: MachineProperties, weights: str, arch: str = ""
) -> list[Choice]:
    """Return the settings for a dataset, in order of importance.

    Args:
        data: Properties of the data.
        machine: Properties of the hardware.
        weights: Pretrained weights of the backbone, or "" to train from scratch.
        arch: Name of the backbone in the user's own weight file. If empty, a backbone is chosen.
    """
    why = "the network in the weight file" if arch else _why_backbone(machine, weights)
    arch = arch or (backbone(machine)[0] if weights else "se_resnet18")
    base = "finetune" if weights else "scratch"
    choices = [
        Choice(
            "_BASE_",
            f"{base}_{'detector' if data.task == 'detection' else 'folder'}",
            f"{data.task}, {data.images} training images, {data.classes} classes",
        ),
        Choice("MODEL.BACKBONE.ARCH", arch, why),
        Choice(
            "MODEL.WEIGHTS",
            weights,
            "ImageNet weights" if weights else "random weights: no pretrained weights",
        ),
    ]
    if arch.partition("_")[0] not in ("se", "senet154"):
        choices.append(Choice("MODEL.SE.ENABLED", False, "the network has no SE"))
    task = _detection if data.task == "detection" else _classification
    return [*choices, *task(data, machine, bool(weights))]


def _why_backbone(machine: MachineProperties, weights: str) -> str:
    if not weights:
        return "a small backbone is faster to train from scratch"
    if machine.gpu_memory >= LARGE_GPU:
        return f"the GPU has {machine.gpu_memory:g} GB"
    if machine.gpu_memory:
        return f"the GPU has only {machine.gpu_memory:g} GB"
    return "the run is on the CPU"


def _detection(data: DataProperties, machine: MachineProperties, pretrained: bool) -> list[Choice]:
    low, high = _SIDES if machine.gpu_memory else _CPU_SIDES
    wanted = max(data.short_side, _SMALLEST_ANCHOR / data.object_size)
    side = _multiple(wanted, 32, low, high)
    why = f"median image {data.short_side} px"
    if wanted > data.short_side:
        why += f", enlarged for small objects ({data.object_size * data.short_side:.0f} px)"
    if wanted > high:
        why += f", at most {high} on a {'GPU' if machine.gpu_memory else 'CPU'}"
    longest = round(side * 1333 / 800)
    small = data.object_size * side < _SMALLEST_ANCHOR
    first = _SMALLEST_ANCHOR // 2 if small else _SMALLEST_ANCHOR
    choices = [
        Choice("INPUT.MIN_SIZE_TEST", side, f"shorter side: {why}"),
        Choice("INPUT.MAX_SIZE_TEST", longest, "5/3 of the shorter side, as in Detectron2"),
        Choice(
            "INPUT.MIN_SIZE_TRAIN",
            [round(side * part / 20) for part in range(15, 21)],
            "six sizes as augmentation",
        ),
        Choice("INPUT.MAX_SIZE_TRAIN", longest, "as in evaluation"),
        Choice(
            "MODEL.ANCHOR_GENERATOR.SIZES",
            [[first * 2**level] for level in range(5)],
            f"the smallest 10% of the objects are at most {data.object_size * side:.0f} px",
        ),
    ]
    if data.most_objects > 100:
        choices.append(
            Choice(
                "TEST.DETECTIONS_PER_IMAGE",
                _multiple(data.most_objects * 1.5, 100, 200, 1000),
                f"up to {data.most_objects} objects in an image",
            )
        )
    fits = 4.0
    if machine.gpu_memory:
        fits = machine.gpu_memory / 2 * (640 * 1066) / (side * longest)
    batch = _batch(machine, fits, 16)
    if not pretrained and batch.value < 4 * machine.processes:
        why = "fewer than 4 images per process"
        choices += [Choice(f"MODEL.{part}.NORM", "GN", why) for part in ("RESNETS", "FPN")]
    choices += _schedule(data, machine, batch, pretrained)
    return [*choices, Choice("TEST.BEST_METRIC", "bbox/AP", "for model_best.pth")]


def _classification(
    data: DataProperties, machine: MachineProperties, pretrained: bool
) -> list[Choice]:
    low, high = _CROPS if machine.gpu_memory else _CPU_CROPS
    crop = max(low, min(data.short_side // 32 * 32, high))
    choices = [
        Choice(
            "INPUT.CLASSIFICATION.CROP",
            crop,
            f"median image {data.short_side} px, at most {high} on a "
            f"{'GPU' if machine.gpu_memory else 'CPU'}",
        ),
        Choice("INPUT.CLASSIFICATION.TEST_CROP", crop, "as in training"),
        Choice(
            "INPUT.CLASSIFICATION.TEST_RESIZE",
            round(crop * 256 / 224),
            "256/224 of the crop, as for ImageNet",
        ),
    ]
    most = 2 ** round(math.log2(max(data.images / 30, 16)))
    most = min(most, 256 if machine.gpu_memory and pretrained else 64)
    fits = 8 * machine.gpu_memory * (224 / crop) ** 2 if machine.gpu_memory else 32.0
    batch = _batch(machine, fits, most)
    return [*choices, *_schedule(data, machine, batch, pretrained)]


def _batch(machine: MachineProperties, fits: float, most: int) -> Choice:
    """Return the batch size: ``fits`` images per process, but at most ``most`` images in total.

    Each process receives at least one image.
    """
    share = max(1, min(int(fits), most // machine.processes))
    reason = f"{machine.processes} process{'es' * (machine.processes > 1)} with {share} images"
    if machine.gpu_memory:
        reason += f", {machine.gpu_memory:g} GB per GPU"
    return Choice("SOLVER.IMS_PER_BATCH", share * machine.processes, reason)


def _schedule(
    data: DataProperties, machine: MachineProperties, batch: Choice, pretrained: bool
) -> list[Choice]:
    """Return the settings for the batch size, learning rate, schedule and data loader workers."""
    views, least, most = SCHEDULES[data.task, pretrained]
    if not machine.gpu_memory:
        fewer, least = CPU_SCHEDULES[data.task]
        views = min(views, fewer)
    epochs = max(least, min(round(views / data.images), most))
    rate = _RATES[data.task, pretrained]
    steps = [round(epochs * 2 / 3, 2), round(epochs * 8 / 9, 2)]
    period = max(1, round(epochs / _EVALUATIONS))
    workers = min(8, machine.cpus // machine.processes)
    if not machine.gpu_memory:
        workers = min(1, workers - 1)
    # Only the recipe for fine-tuning a detector reduces the learning rate in steps.
    steps_down = data.task == "detection" and pretrained
    return [
        batch,
        Choice(
            "SOLVER.BASE_LR",
            round(rate * batch.value, 8),
            f"{rate:g} per image, linear in the batch size",
        ),
        Choice(
            "SOLVER.EPOCHS",
            epochs,
            f"{views:,} images in training, at least {least} and at most {most} epochs",
        ),
        *([Choice("SOLVER.STEP_EPOCHS", steps, "2/3 and 8/9 of the epochs")] * steps_down),
        Choice("SOLVER.WARMUP_EPOCHS", round(epochs / 15, 2), "1/15 of the epochs"),
        Choice("SOLVER.CHECKPOINT_EPOCHS", period, "with each evaluation"),
        Choice("TEST.EVAL_EPOCHS", period, f"about {_EVALUATIONS} evaluations"),
        Choice("DATALOADER.NUM_WORKERS", max(0, workers), f"{machine.cpus} CPU cores"),
    ]


def _multiple(value: float, of: int, low: int, high: int) -> int:
    """Round a number to the nearest multiple of ``of``, and clamp it to ``[low, high]``."""
    return max(low, min(round(value / of) * of, high))
