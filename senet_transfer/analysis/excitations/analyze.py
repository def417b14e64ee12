"""Analysis of a network's SE gates on labelled images, with figures and tables."""

import os
from dataclasses import dataclass, field, replace

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
from senet_transfer.config import is_classification
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import find_dataset
from senet_transfer.data.cifar.in_memory import load_images
from senet_transfer.data.cifar.open import ArrayDataset, is_prepared
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.crops import CocoCrops, CocoImages
from senet_transfer.data.detection.formats.source import (
    default_image_folder,
    find_source,
    split_path,
)
from senet_transfer.data.images.decode import UPRIGHT, Reading
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.data.reading import reading_of
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.predictor.predictor import (
    ClassifierPredictor,
    DetectorPredictor,
    Predictor,
)
from senet_transfer.errors import UserError


@dataclass(frozen=True)
class GateAnalysis:
    """Results of a gate analysis.

    Attributes:
        excitations: Statistics of all gates.
        files: Paths of the figures and tables.
        pruned: Evaluations of the network with all gates and of its pruned versions. Empty without
            pruning.
        pruned_file: Path of the best pruned network. Empty without pruning.
    """

    excitations: Excitations
    files: list[str]
    pruned: list[Pruned] = field(default_factory=list)
    pruned_file: str = ""


def open_labelled(
    data: str, images: str = "", group_by: str = "", reading: Reading = UPRIGHT
) -> ClassificationDataset:
    """Open a labelled classification or detection dataset of any supported format.

    Args:
        data: A path accepted by :func:`~senet_transfer.data.classification.open.open_dataset`, a
            prepared CIFAR split (its path, or a name such as "cifar10_test"), or object annotations
            in any supported format. A split can be appended, as in "bccd:test".
        images: The image folder for annotations. Required for a JSON file in COCO format.
        group_by: If "class" or "size", whole images are grouped by the class or size of more than
            half of their objects. If empty, the objects are cropped and grouped by class.
        reading: Settings for reading the images of detection data.

    Raises:
        UserError: If the data is missing or corrupted.
    """
    is_json = data.endswith(".json") and os.path.basename(data) != "manifest.json"
    if is_json and not images:
        raise UserError(f"No image folder is given for {data}. Pass it with --images.")
    if is_json or find_source(split_path(data)[0]):
        images = images or default_image_folder(data)
        if group_by:
            return CocoImages(data, images, by=group_by, upright=reading.upright)
        return CocoCrops(data, images, reading=reading)
    if images or group_by:
        raise UserError(
            f"{'--images' if images else '--group-by'} requires object annotations as --data, such "
            f"as a JSON file in COCO format, but --data is {data}. Pass object annotations, or "
            f"remove {'--images' if images else '--group-by'}."
        )
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
    """Collect gate statistics of a model, write figures and tables, and optionally prune gates.

    Args:
        loaded: A classifier or detector with SE.
        dataset: Labelled images. Their classes can differ from the model's classes.
        output: The output folder.
        images_per_class: The maximum number of images per class.
        classes: The names of the classes to plot. If None, ``num_classes`` classes are selected at
            random.
        num_classes: The number of classes to plot if ``classes`` is None.
        channels: The number of channels per figure.
        seed: The seed for the random selection of images, classes and channels.
        prune_stages: The stages from which gates are removed. The classifier is evaluated with and
            without these gates, and the network without them is written to ``output/pruned``.
        batch_size: The number of images per batch.
        workers: The number of processes that read and decode images.
        quiet: If True, show no progress bar.

    Raises:
        UserError: If the model has no gates, if a value is invalid, or if a file can't be written.
    """
    if channels < 1:
        raise UserError(f"--channels is {channels}; expected 1 or more.")
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The output folder {output} can't be created: {error}. Choose a different --output."
        ) from error
    gates_of(backbone_of(loaded.model))
    # Reject invalid options before starting the long computation.
    whole = isinstance(dataset, CocoImages)
    if whole and prune_stages:
        raise UserError(
            "--prune-stage evaluates a classifier, but --group-by groups images without class "
            "labels. Remove one of these options."
        )
    pruned = pruned_config(loaded.cfg, loaded.model, prune_stages) if prune_stages else None
    transform = _transform(loaded)
    loading = {"batch_size": batch_size, "workers": workers, "quiet": quiet}
    found = collect_excitations(
        loaded.model,
        dataset,
        _predictor(loaded) if whole else transform,
        images_per_class=images_per_class,
        classes=classes,
        num_classes=num_classes,
        seed=seed,
        **loading,
    )
    drawing = {"channels": channels, "seed": seed}
    files = write_csv(found, output)
    files += write_overview(found, output, **drawing)
    files += write_blocks(found, os.path.join(output, "blocks"), **drawing)
    if pruned is None:
        return GateAnalysis(found, files)
    rows = measure_pruning(pruned, loaded.model, found, dataset, transform, **loading)
    pruned.DATASETS.CLASSES = dataset.classes
    path = save_pruned(pruned, rows, os.path.join(output, "pruned"))
    return GateAnalysis(found, files, rows, path)


def _predictor(loaded: LoadedModel) -> Predictor:
    """Return the predictor for a model, without test-time augmentation or multiple crops."""
    if is_classification(loaded.cfg):
        predictor = ClassifierPredictor.of(loaded)
        predictor.transform = _transform(loaded)
        return predictor
    cfg = loaded.cfg.clone()
    cfg.defrost()
    cfg.TEST.AUG.ENABLED = False
    return DetectorPredictor.of(replace(loaded, cfg=cfg))


def _transform(loaded: LoadedModel) -> EvalTransform:
    expected = loaded.preprocessing
    mode = loaded.cfg.INPUT.CLASSIFICATION.TEST_MODE
    return EvalTransform(
        # Gates are recorded for a single crop per image.
        mode="short_side" if mode == "ten_crop" else mode,
        resize=expected.resize,
        crop=expected.crop,
        interpolation=expected.interpolation,
        reading=reading_of(loaded.cfg),
    )
