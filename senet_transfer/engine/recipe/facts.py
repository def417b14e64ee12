"""Properties of the dataset and the hardware from which a recipe is derived."""

import io
import math
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.utils import comm
from PIL import Image

from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.annotation_checks import read_coco_summary
from senet_transfer.data.detection.dataset_checks import check_objects
from senet_transfer.data.detection.formats.source import read_annotations
from senet_transfer.data.own_data import DataPart

# Maximum number of images whose size is read in a classification dataset.
_SAMPLE = 100


@dataclass(frozen=True)
class DataProperties:
    """Properties of the training data from which a recipe is derived.

    Attributes:
        task: "detection" or "classification".
        images: Number of training images. For detection, only images with objects are counted.
        classes: Number of classes.
        short_side: Median of the images' shorter sides, in pixels.
        object_size: 10th percentile of the objects' sizes (square root of the area), divided by
            the shorter side of the image. All classes have the same weight, as in COCO's AP. 0 for
            classification.
        most_objects: Maximum number of objects in an image; 0 for classification.
    """

    task: str
    images: int
    classes: int
    short_side: int
    object_size: float = 0.0
    most_objects: int = 0


@dataclass(frozen=True)
class MachineProperties:
    """Properties of the machines on which a run trains.

    Attributes:
        gpu_memory: Memory of the smallest GPU, in GB; 0 for a run on the CPU.
        processes: Number of processes in the run, one per GPU.
        cpus: Total number of CPU cores that the run may use on all machines.
    """

    gpu_memory: float
    processes: int
    cpus: int


def describe_data(train: DataPart, val: DataPart, *, upright: bool = True) -> DataProperties:
    """Collect the properties of a dataset that determine the recipe.

    Args:
        train: Training data.
        val: Validation data. It is used only for detection, to determine the maximum number of
            objects in an image.
        upright: True if annotations refer to images with the EXIF orientation applied.

    Raises:
        UserError: If the data is missing or invalid, or contains no objects to train on.
    """
    if not train.image_dir:
        dataset = open_dataset(train.path, split="train_standard")
        count = len(dataset)
        indices = np.linspace(0, count - 1, min(count, _SAMPLE)).round().astype(int)
        sides = []
        for index in indices:
            try:
                with Image.open(io.BytesIO(dataset.read_sample(int(index)).data)) as image:
                    sides.append(min(image.size))
            # Pillow can't read the image. Training counts and limits such images.
            except (OSError, ValueError, Image.DecompressionBombError):
                continue
        return DataProperties(
            "classification", count, dataset.num_classes, int(np.median(sides or [224]))
        )
    summaries = [read_coco_summary(*part, upright=upright) for part in (train, val)]
    summary = summaries[0]
    check_objects([train.path], [summary])
    sides_by_id = {number: min(width, height) for _, width, height, number in summary.images}
    objects = [
        item
        for item in read_annotations(*train, upright=upright)["annotations"]
        if not item.get("iscrowd") and 0 not in item["bbox"][2:]
    ]
    counts = Counter(item["category_id"] for item in objects)
    sizes = sorted(
        (math.sqrt(w * h) / sides_by_id[item["image_id"]], 1 / counts[item["category_id"]])
        for item in objects
        for _, _, w, h in [item["bbox"]]
    )
    # The weights of the objects in each class sum to 1.
    place = np.searchsorted(np.cumsum([weight for _, weight in sizes]), 0.1 * len(counts))
    return DataProperties(
        "detection",
        images=len({item["image_id"] for item in objects}),
        classes=len(summary.classes),
        short_side=int(np.median(list(sides_by_id.values()))),
        object_size=sizes[place][0],
        most_objects=max(part.most_objects for part in summaries),
    )


def describe_machine(device: str) -> MachineProperties:
    """Return the GPU memory and the number of processes and CPU cores that this run can use.

    Args:
        device: The device of the run, such as "cuda" or "cpu".
    """
    memory = 0.0
    if device.startswith("cuda") and torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        memory = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus) / 2**30
    machines = comm.get_world_size() // comm.get_local_size()
    # Count the cores of all machines, because the run's processes are on all machines.
    cpus = machines * len(os.sched_getaffinity(0))
    return MachineProperties(round(memory, 1), comm.get_world_size(), cpus)
