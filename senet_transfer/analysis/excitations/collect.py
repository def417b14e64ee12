"""Collection of gate statistics over a sample of labelled images."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.modeling import FPN
from torch import Tensor, nn

from senet_transfer.analysis.excitations.gates import capture_gates, gates_of
from senet_transfer.analysis.excitations.statistics import GateStatistics
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.classification.loader import Batch, build_classification_eval_loader
from senet_transfer.data.classification.subsets import ClassSample, draw
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.predictor.predictor import Predictor
from senet_transfer.errors import UserError
from senet_transfer.models.image_classifier import ImageClassifier
from senet_transfer.preprocessing import normalise
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import first_of


@dataclass(frozen=True)
class Excitations:
    """Statistics of a network's gates on a sample of images.

    Attributes:
        blocks: Statistics of each gate, keyed by name, such as "SE_4_6"; see :func:`gates_of`.
        drawn: Names of the classes to plot, keyed by label.
        counts: Name and number of images of each class in the sample.
        unit: What the images are grouped by, "class" or object "size"; used in the text of figures.
    """

    blocks: dict[str, GateStatistics]
    drawn: dict[int, str]
    counts: tuple[tuple[str, int], ...]
    unit: str = "class"

    @property
    def images(self) -> int:
        """Number of images in the sample."""
        return sum(count for _, count in self.counts)

    @property
    def classes(self) -> int:
        """Number of classes in the sample of images."""
        return len(self.counts)

    @property
    def units(self) -> str:
        """Plural noun used in figure text for the groups of images: "classes" or "sizes"."""
        return "sizes" if self.unit == "size" else "classes"


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the backbone of a classifier or detector, excluding an FPN."""
    return model.backbone.bottom_up if isinstance(model.backbone, FPN) else model.backbone


def backbone_input(model: nn.Module, images: Tensor) -> Tensor:
    """Convert RGB images, uint8 ``(N, 3, H, W)``, to inputs for the model's backbone."""
    if isinstance(model, ImageClassifier):
        return model.normalise(images)
    images = images.to(model.pixel_mean.device)
    return normalise(images, model.pixel_mean, model.pixel_std, model.input_format)


def choose_classes(
    sample: ClassSample, names: list[str] | None, count: int, *, seed: int = 0
) -> dict[int, str]:
    """Return the names of the classes to plot, keyed by label.

    Args:
        sample: The images sampled from the dataset.
        names: The class names. If empty, ``count`` classes with images are selected at random.
        count: The number of classes to select.
        seed: The seed for the random selection.

    Raises:
        UserError: If a class is not in the dataset or has no images.
    """
    with_images = [label for label in range(sample.num_classes) if sample.counts[label]]
    if not names:
        return {label: sample.classes[label] for label in draw(with_images, count, seed=seed)}
    there = {sample.classes[label]: label for label in with_images}
    missing = [name for name in names if name not in there]
    if missing:
        raise UserError(
            f"{sample.origin} contains no images of {', '.join(missing)}; expected classes "
            f"that have images, such as {first_of(there)}."
        )
    return {there[name]: name for name in names}


@torch.inference_mode()
def collect_excitations(
    model: nn.Module,
    dataset: ClassificationDataset,
    transform: EvalTransform | Predictor,
    *,
    images_per_class: int = 50,
    classes: list[str] | None = None,
    num_classes: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    quiet: bool = False,
) -> Excitations:
    """Collect gate statistics for a model's backbone on a sample of images from each class.

    The classes in the dataset can differ from the model's classes.

    Args:
        model: An ``ImageClassifier`` or a Detectron2 detector, in evaluation mode.
        dataset: Labelled images.
        transform: The evaluation transform, which resizes and crops the images, or the model's
            predictor, which reads whole images from their paths and processes them one by one.
        images_per_class: The maximum number of images per class. It is 50 in the paper.
        classes: The names of the classes to plot. If None, ``num_classes`` classes are selected at
            random.
        num_classes: The number of classes to plot if ``classes`` is None. It is 4 in the paper.
        seed: The seed for the random selection of images and classes.
        batch_size: The number of images per batch.
        workers: The number of processes that read and decode images.
        quiet: If True, show no progress bar. The bar is also hidden if stderr isn't a terminal.

    Raises:
        UserError: If the model has no gates, if a class is unknown, or if an image is corrupted.
    """
    if images_per_class < 1 or num_classes < 1:
        raise UserError(
            f"images_per_class is {images_per_class} and num_classes is {num_classes}; expected 1 "
            "or more for both."
        )
    gates = gates_of(backbone_of(model))
    sample = ClassSample(dataset, images_per_class, seed=seed)
    drawn = choose_classes(sample, classes, num_classes, seed=seed)
    blocks = {name: GateStatistics(sample.counts, list(drawn)) for name in gates}
    if isinstance(transform, Predictor):
        batches = _whole_images(transform, gates, sample)
    else:
        loader = build_classification_eval_loader(
            sample, batch_size=batch_size, transform=transform, num_workers=workers
        )
        batches = _batches(model, gates, loader)
    with progress(total=len(sample), unit="image", quiet=quiet) as bar:
        for labels, values in batches:
            _add(blocks, labels, values)
            bar.update(len(labels))
    pairs = zip(sample.classes, sample.counts.tolist(), strict=True)
    counts = tuple((name, count) for name, count in pairs if count)
    return Excitations(blocks, drawn, counts, getattr(dataset, "by", "class"))


def _add(blocks: dict[str, GateStatistics], labels: np.ndarray, values: dict[str, Tensor]) -> None:
    for name, statistics in blocks.items():
        statistics.update(labels, values[name].cpu().numpy())


def _batches(
    model: nn.Module, gates: dict[str, nn.Module], loader: Iterable[Batch]
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield the labels ``(N,)`` and a dict from gate name to gate values for each batch."""
    with capture_gates(gates) as values:
        for batch in loader:
            backbone_of(model)(backbone_input(model, batch["image"]))
            yield batch["label"].numpy(), values


def _whole_images(
    predictor: Predictor, gates: dict[str, nn.Module], sample: ClassSample
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield the label ``(1,)`` and the gate values of each image, using the predictor."""
    with capture_gates(gates) as values:
        for index, label in enumerate(sample.labels()):
            predictor(sample.read_sample(index).path)
            yield np.array([label]), values
