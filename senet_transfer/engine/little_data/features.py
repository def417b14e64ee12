"""Pooled features of a frozen backbone for the images of a classification dataset."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from safetensors.torch import save_file
from torch import Tensor, nn

from senet_transfer.config import is_classification
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import (
    eval_transform,
    open_test_dataset,
    open_train_dataset,
    use_classification_datasets,
)
from senet_transfer.data.cifar.in_memory import ImageArrays
from senet_transfer.engine.model_from import LoadedModel, ModelSource
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification import eval_batches
from senet_transfer.weights.save import check_suffix, written_whole

SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True)
class Features:
    """Features of a dataset's images, in the order of the dataset.

    Attributes:
        features: The input of the classifier's linear layer, float32 ``(N, D)``.
        labels: Class indices, int64 ``(N,)``.
        paths: Paths of the images.
        classes: Class names, indexed by label.
    """

    features: Tensor
    labels: Tensor
    paths: list[str]
    classes: list[str]

    def write(self, path: str) -> None:
        """Write the features, labels, paths and class names to an .npz or .safetensors file.

        A .safetensors file contains the paths and classes as JSON in its metadata.

        Raises:
            UserError: If the suffix is unknown or the file can't be written.
        """
        check_features_file(path)
        with written_whole(Path(path)) as partial:
            if path.endswith(".npz"):
                with open(partial, "wb") as stream:
                    np.savez(
                        stream,
                        features=self.features.numpy(),
                        labels=self.labels.numpy(),
                        paths=np.array(self.paths),
                        classes=np.array(self.classes),
                    )
            else:
                texts = {name: json.dumps(getattr(self, name)) for name in ("paths", "classes")}
                save_file({"features": self.features, "labels": self.labels}, partial, texts)


def check_features_file(path: str) -> None:
    """Raise a UserError if the suffix of a feature file is not supported."""
    check_suffix(Path(path), SUFFIXES)


def load_backbone(found: ModelSource, device: str = "") -> LoadedModel:
    """Build a classifier and load its backbone; the weight file may lack the linear layer.

    Raises:
        UserError: If the model is not a classifier, or the weight file does not contain all
            backbone weights.
    """
    if not is_classification(found.cfg):
        raise UserError(
            f"MODEL.META_ARCHITECTURE in {found.config_file} is "
            f"{found.cfg.MODEL.META_ARCHITECTURE}; expected ImageClassifier. To use the backbone "
            "of a detector, write it to a file with `senet convert WEIGHTS backbone.pth "
            "--backbone`, and pass that file with --model NAME --weights backbone.pth."
        )
    if not found.cfg.MODEL.WEIGHTS:
        raise UserError(
            "There are no weights: neither --weights nor MODEL.WEIGHTS is set. The features of a "
            "randomly initialised network are not useful. Pass --weights."
        )
    return found.build(device, backbone_only=True)


def open_labelled(
    cfg: CfgNode, *, train: str = "", test: str, classes: str = ""
) -> list[ClassificationDataset | ImageArrays]:
    """Open labelled classification data with the input settings of a config.

    Args:
        cfg: The model's config. The datasets and classes in the config are not used.
        train: A dataset in any supported format, which determines the classes. If empty, only
            ``test`` is opened.
        test: A dataset with the same classes as ``train``.
        classes: Order of the labels: "numeric", or a file with one class name per line. If empty,
            the order of the data is used.

    Raises:
        UserError: If a dataset is missing or damaged, or the datasets have different classes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), (test,)
    cfg.DATASETS.CLASSES = []
    use_classification_datasets(cfg, eval_only=not train, classes=classes)
    opened = [open_test_dataset(cfg, cfg.DATASETS.TEST[0])]
    return [open_train_dataset(cfg), *opened] if train else opened


def extract_features(
    loaded: LoadedModel,
    dataset: ClassificationDataset | ImageArrays,
    *,
    batch_size: int = 32,
    workers: int = 0,
    quiet: bool = False,
) -> Features:
    """Compute the pooled features of all images with the evaluation transform of the config.

    With ten-crop evaluation, the features are averaged over the ten crops.

    Args:
        loaded: A classifier. It is not changed.
        dataset: The dataset, whose classes may differ from the classifier's.
        batch_size: The number of images per batch.
        workers: The number of processes that read and decode images. Each process builds batches
            from its own subset of the images.
        quiet: If True, show no progress bar.

    Raises:
        UserError: If an image is missing or corrupted, or a feature is not finite.
    """
    model = loaded.model
    batches = eval_batches(model, dataset, eval_transform(loaded.cfg), batch_size, workers, quiet)
    places: list[int] = []
    paths: list[str] = []
    parts: list[tuple[Tensor, Tensor]] = []
    linear, model.linear = model.linear, nn.Identity()
    try:
        with torch.inference_mode():
            for batch in batches:
                parts.append((model(batch).float().cpu(), batch["label"].cpu()))
                places += batch["index"]
                paths += batch["path"]
    finally:
        model.linear = linear
    order = np.argsort(places)
    features, labels = (torch.cat(column)[order] for column in zip(*parts, strict=True))
    paths = [paths[place] for place in order]
    _check_finite(features, paths)
    return Features(features.clone(), labels.clone(), paths, list(dataset.classes))


def _check_finite(features: Tensor, paths: Sequence[str]) -> None:
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"The features of {len(bad)} of {len(paths)} images are not finite; the first image is "
            f"{paths[bad[0]]}. The weights are damaged, or training diverged. Use different "
            "weights."
        )
