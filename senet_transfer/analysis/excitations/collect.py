"""One pass of a network over a sample of labelled images, for the statistics of its gates."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.modeling import FPN
from torch import Tensor, nn

from senet_transfer.analysis.excitations.gates import gates_of, watched
from senet_transfer.analysis.excitations.statistics import GateStatistics
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.classification.class_sample import ClassSample, draw
from senet_transfer.data.classification.loader import Batch, build_classification_eval_loader
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation
from senet_transfer.models.image_classifier import ImageClassifier
from senet_transfer.preprocessing import normalise
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import first_of


@dataclass(frozen=True)
class Excitations:
    """What the gates of a network did on a sample of images.

    Attributes:
        blocks: by the paper's name of each.
        drawn: the classes whose own values were kept, by label.
        images: how many were seen.
        classes: how many classes these are of.
    """

    blocks: dict[str, GateStatistics]
    drawn: dict[int, str]
    images: int
    classes: int


def backbone_of(model: nn.Module) -> nn.Module:
    """The backbone of a classifier or a detector, which is what sees an image first."""
    return model.backbone.bottom_up if isinstance(model.backbone, FPN) else model.backbone


def backbone_input(model: nn.Module, images: Tensor) -> Tensor:
    """Convert RGB images, uint8 ``(N, 3, H, W)``, to the input of the model's backbone."""
    if isinstance(model, ImageClassifier):
        return model.normalise(images)
    images = images.to(model.pixel_mean.device)
    return normalise(images, model.pixel_mean, model.pixel_std, model.input_format)


def choose_classes(
    sample: ClassSample, names: list[str] | None, count: int, *, seed: int = 0
) -> dict[int, str]:
    """The classes to draw, by label: those named, or so many of those that have images.

    Raises:
        UserError: a name is no class of the data, or has no images.
    """
    with_images = [label for label in range(sample.num_classes) if sample.counts[label]]
    if not names:
        return {label: sample.classes[label] for label in draw(with_images, count, seed=seed)}
    there = {sample.classes[label]: label for label in with_images}
    missing = [name for name in names if name not in there]
    if missing:
        raise UserError(
            f"{sample.origin} has no images of {', '.join(missing)}. Expected some of: "
            f"{first_of(there)}."
        )
    return {there[name]: name for name in names}


@torch.inference_mode()
def collect_excitations(
    model: nn.Module,
    dataset: ClassificationDataset,
    transform: EvalTransform,
    *,
    images_per_class: int = 50,
    classes: list[str] | None = None,
    num_classes: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    quiet: bool = False,
) -> Excitations:
    """Collect the gates of a model's backbone on a sample of each class of a data set.

    The classes need not be those that the model knows.

    Args:
        model: an ``ImageClassifier`` or a Detectron2 detector, in evaluation mode.
        dataset: labelled images.
        transform: the view of an image that the backbone sees.
        images_per_class: the most that are taken of each class; 50 in the paper.
        classes: names of the classes to keep for drawing; None draws ``num_classes`` of them.
        num_classes: likewise; 4 in the paper.
        seed: images and classes follow from it.
        batch_size: images a batch.
        workers: processes that read and decode.
        quiet: no progress bar; there is none either where stderr is no terminal.

    Raises:
        UserError: the model has no gates, or there is no such class; an image is broken.
    """
    if images_per_class < 1 or num_classes < 1:
        raise UserError(
            f"images_per_class is {images_per_class} and num_classes {num_classes}, expected 1 or "
            "more of both."
        )
    gates = gates_of(backbone_of(model))
    sample = ClassSample(dataset, images_per_class, seed=seed)
    drawn = choose_classes(sample, classes, num_classes, seed=seed)
    blocks = {name: GateStatistics(sample.counts, list(drawn)) for name in gates}
    loader = build_classification_eval_loader(
        sample, batch_size=batch_size, transform=transform, num_workers=workers
    )
    with progress(total=len(sample), unit="image", quiet=quiet) as bar:
        for labels, values in _batches(model, gates, loader):
            _add(blocks, labels, values)
            bar.update(len(labels))
    return Excitations(blocks, drawn, len(sample), int(np.count_nonzero(sample.counts)))


def _add(blocks: dict[str, GateStatistics], labels: np.ndarray, values: dict[str, Tensor]) -> None:
    for name, statistics in blocks.items():
        statistics.update(labels, values[name].cpu().numpy())


def _batches(
    model: nn.Module, gates: dict[str, SqueezeExcitation], loader: Iterable[Batch]
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Labels and gates of each batch."""
    with watched(gates) as values:
        for batch in loader:
            backbone_of(model)(backbone_input(model, batch["image"]))
            yield batch["label"].numpy(), values
