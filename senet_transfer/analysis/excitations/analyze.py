"""The analysis of the gates of a network, from labelled images to figures and tables."""

import os
from dataclasses import dataclass, field

from senet_transfer.analysis.excitations.collect import (
    Excitations,
    backbone_of,
    collect_excitations,
)
from senet_transfer.analysis.excitations.figures import write_blocks, write_overview
from senet_transfer.analysis.excitations.gates import gates_of
from senet_transfer.analysis.excitations.prune import (
    Pruned,
    measure_pruning,
    pruned_config,
    save_pruned,
)
from senet_transfer.analysis.excitations.tables import write_csv
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import find_dataset
from senet_transfer.data.cifar.in_memory import load_images
from senet_transfer.data.cifar.open import ArrayDataset, is_prepared
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.crops import CocoCrops
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.errors import UserError


@dataclass(frozen=True)
class GateAnalysis:
    """The results of an analysis.

    Attributes:
        excitations: the statistics of all gates.
        files: the figures and tables that were written.
        pruned: the network with its gates and without some, evaluated; empty without pruning.
        pruned_file: the best network without the gates; empty without pruning.
    """

    excitations: Excitations
    files: list[str]
    pruned: list[Pruned] = field(default_factory=list)
    pruned_file: str = ""


def open_labelled(data: str, images: str = "") -> ClassificationDataset:
    """Open labelled images of any kind.

    Args:
        data: whatever :func:`~senet_transfer.data.classification.open.open_dataset` opens, a
            prepared split of CIFAR by its path or as "cifar10_test", or a JSON in COCO's format.
        images: the folder of the images of the JSON.

    Raises:
        UserError: there is no such data, or it is damaged.
    """
    if data.endswith(".json") and os.path.basename(data) != "manifest.json":
        if not images:
            raise UserError(f"{data} is a JSON: name the folder of its images with --images.")
        return CocoCrops(data, images)
    if images:
        raise UserError(f"--images goes with a JSON in COCO's format, and --data is {data}.")
    path = find_dataset(data)
    if is_prepared(path):
        return ArrayDataset(load_images(path))
    return open_dataset(path, split="val")


def analyze_gates(
    loaded: LoadedModel,
    dataset: ClassificationDataset,
    output: str,
    *,
    images_per_class: int = 50,
    classes: list[str] | None = None,
    num_classes: int = 4,
    channels: int = 50,
    seed: int = 0,
    prune_stages: list[int] | None = None,
    batch_size: int = 32,
    workers: int = 2,
    quiet: bool = False,
) -> GateAnalysis:
    """Collect the statistics of a model's gates, write figures and tables, and prune.

    Args:
        loaded: a classifier or detector with SE.
        dataset: labelled images; the classes need not be the model's.
        output: the folder to write to.
        images_per_class: the largest number of images of each class.
        classes: names of the classes to draw; None draws ``num_classes`` of them at random.
        num_classes: see ``classes``.
        channels: the number of channels in a figure.
        seed: of the choice of images, classes and channels.
        prune_stages: the stages whose gates are dropped: the classifier is evaluated with and
            without them, and the network without them is written to ``output/pruned``.
        batch_size: images per batch.
        workers: processes that read and decode.
        quiet: no progress bar.

    Raises:
        UserError: the model has no gates, a value is invalid, or a file can't be written.
    """
    if channels < 1:
        raise UserError(f"--channels is {channels}, expected 1 or more.")
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {output} can't be made: {error}.") from error
    gates_of(backbone_of(loaded.model))
    # Mistakes are errors before the long part begins.
    pruned = pruned_config(loaded.cfg, loaded.model, prune_stages) if prune_stages else None
    transform = _transform(loaded)
    reading = {"batch_size": batch_size, "workers": workers, "quiet": quiet}
    found = collect_excitations(
        loaded.model,
        dataset,
        transform,
        images_per_class=images_per_class,
        classes=classes,
        num_classes=num_classes,
        seed=seed,
        **reading,
    )
    drawing = {"channels": channels, "seed": seed}
    files = write_csv(found, output)
    files += write_overview(found, output, **drawing)
    files += write_blocks(found, os.path.join(output, "blocks"), **drawing)
    if pruned is None:
        return GateAnalysis(found, files)
    rows = measure_pruning(pruned, loaded.model, found, dataset, transform, **reading)
    pruned.DATASETS.CLASSES = dataset.classes
    path = save_pruned(pruned, rows, os.path.join(output, "pruned"))
    return GateAnalysis(found, files, rows, path)


def _transform(loaded: LoadedModel) -> EvalTransform:
    expected = loaded.preprocessing
    mode = loaded.cfg.INPUT.CLASSIFICATION.TEST_MODE
    return EvalTransform(
        # A gate belongs to one view of an image.
        mode="short_side" if mode == "ten_crop" else mode,
        resize=expected.resize,
        crop=expected.crop,
        interpolation=expected.interpolation,
    )
