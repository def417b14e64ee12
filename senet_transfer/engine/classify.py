"""Predictions of a classifier on a user's own images."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from senet_transfer.classification.evaluator import TOP
from senet_transfer.classification.from_config import eval_transform
from senet_transfer.data.decode import BrokenImageError
from senet_transfer.engine.checkpoint import Checkpointer
from senet_transfer.errors import UserError
from senet_transfer.progress import progress


@torch.inference_mode()
def classify_images(
    cfg: CfgNode, images: list[str], output_dir: str, *, quiet: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """Classifies images and writes the best five classes of each.

    Args:
        cfg: of a trained classifier, as of :func:`~.predict.load_trained`.
        images: paths.
        output_dir: takes ``predictions.json``.
        quiet: no progress bar.

    Returns:
        The path of the JSON, and its content: a dict an image, with ``file_name`` and ``top``, the
        best classes first, each with ``class``, ``label`` and ``probability``.

    Raises:
        UserError: an image can't be read, or the checkpoint does not fit the config.
    """
    model = build_model(cfg)
    Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(cfg.MODEL.WEIGHTS)
    model.eval()
    transform, classes = eval_transform(cfg), list(cfg.DATASETS.CLASSES)
    os.makedirs(output_dir, exist_ok=True)
    found = []
    for path in progress(images, unit="image", quiet=quiet):
        try:
            image = transform(Path(path).read_bytes())
        except (OSError, BrokenImageError) as error:
            raise UserError(f"{path} can't be read as an image: {error}. Leave it out.") from error
        probabilities = model({"image": image[None]})[0].softmax(0).cpu()
        best = probabilities.topk(min(TOP, len(classes)))
        top = [
            {"class": classes[label], "label": label, "probability": probability}
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        found.append({"file_name": path, "top": top})
    json_file = os.path.join(output_dir, "predictions.json")
    with open(json_file, "w") as file:
        json.dump(found, file, indent=2)
        file.write("\n")
    return json_file, found
