"""Evaluation of a frozen backbone on new classes with a linear probe and nearest neighbours."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from senet_transfer.data.build import eval_transform, find_dataset
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.checkpoints.checkpointer import UntaggedCheckpointer
from senet_transfer.engine.little_data.features import (
    extract_features,
    load_backbone,
    open_labelled,
)
from senet_transfer.engine.little_data.linear_probe import fit_linear_probe
from senet_transfer.engine.little_data.neighbours import TEMPERATURE, neighbour_scores, top_errors
from senet_transfer.engine.model_from import LoadedModel, ModelSource
from senet_transfer.engine.predictor.files import make_output_folder
from senet_transfer.engine.results import write_results
from senet_transfer.errors import UserError
from senet_transfer.models.build import backbone_name

CHECKPOINT = "model_final"
RESULTS = "probe.json"


def run_probe(
    found: ModelSource,
    *,
    train: str,
    data: str,
    output: str,
    device: str = "",
    classes: str = "",
    neighbours: int = 20,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 2,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a linear probe and nearest-neighbour classification, and save the results.

    The classifier with the probe as its linear layer is saved as ``model_final.pth``, and its
    config as ``config.yaml``. The results are saved as ``probe.json``.

    Args:
        found: The classifier to evaluate. The probe replaces its linear layer.
        train: The training data.
        data: The evaluation data.
        output: The output folder.
        device: The device for computing the features. If empty, ``MODEL.DEVICE`` is used.
        classes: The class order; see :func:`~.features.open_labelled`.
        neighbours: The number of nearest neighbours.
        seed: The seed for choosing the held-out training images.
        batch_size: The number of images per batch.
        workers: The number of processes that read and decode images.
        quiet: If True, show no progress bar.

    Returns:
        The results, with errors in percent.

    Raises:
        UserError: If a file is missing or does not match the other files, or if the
            output folder contains a training run.
    """
    if neighbours < 1:
        raise UserError(f"The number of neighbours is {neighbours}; expected 1 or more.")
    _check_output(output)
    datasets = open_labelled(found.cfg, train=train, test=data, classes=classes)
    loaded = load_backbone(found, device)
    start = time.perf_counter()
    known, tested = (
        extract_features(loaded, dataset, batch_size=batch_size, workers=workers, quiet=quiet)
        for dataset in datasets
    )
    computed = time.perf_counter()
    probe = fit_linear_probe(known.features, known.labels, len(known.classes), seed=seed)
    model = loaded.model
    linear = nn.Linear(*reversed(probe.weight.shape))
    linear.load_state_dict({"weight": probe.weight, "bias": probe.bias})
    with torch.inference_mode():
        logits = torch.cat([linear(part) for part in tested.features.split(batch_size)])
    model.linear = linear.to(model.device)
    votes = neighbour_scores(
        known.features,
        known.labels,
        tested.features,
        k=neighbours,
        num_classes=len(known.classes),
    )
    nearest = top_errors(votes.log(), tested.labels)
    checkpoint = _save(loaded, known.classes, find_dataset(train), find_dataset(data), output)
    results = {
        **top_errors(logits, tested.labels),
        "num_classes": len(known.classes),
        "neighbours": {"k": neighbours, "temperature": TEMPERATURE, **nearest},
        "weight_decay": probe.weight_decay,
        "train_images": len(known.labels),
        "held_out_images": probe.held_out,
        "tried": probe.tried,
        "seconds": {
            "features": round(computed - start, 2),
            "probe": round(time.perf_counter() - computed, 2),
        },
        "model": backbone_name(loaded.cfg),
        "weights": loaded.cfg.MODEL.WEIGHTS,
        "family": loaded.family,
        "train": datasets[0].origin,
        "data": datasets[1].origin,
        "view": asdict(eval_transform(loaded.cfg)),
        "checkpoint": checkpoint,
    }
    write_results(os.path.join(output, RESULTS), results)
    return results


def _check_output(output: str) -> None:
    """Create the output folder, or raise a UserError if it contains a training run."""
    if Path(output, "config.yaml").is_file() and not Path(output, RESULTS).is_file():
        raise UserError(
            f"{output} contains a training run, whose config.yaml would be replaced. Choose a "
            "different output folder."
        )
    make_output_folder(output)


def _save(loaded: LoadedModel, classes: list[str], train: str, data: str, output: str) -> str:
    """Save the classifier and its config, and return the path of the checkpoint."""
    cfg: CfgNode = loaded.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = output
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), (data,)
    cfg.DATASETS.CLASSES, cfg.DATASETS.CATEGORY_IDS = classes, []
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = len(classes)
    history.write_text(Path(output, "config.yaml"), cfg.dump())
    UntaggedCheckpointer(loaded.model, output, classes=classes).save(CHECKPOINT)
    return os.path.join(output, f"{CHECKPOINT}.pth")
