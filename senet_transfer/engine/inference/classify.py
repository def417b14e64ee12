"""Classification of image files."""

import os
from pathlib import Path
from typing import Any

import torch

from senet_transfer.data.build import eval_transform
from senet_transfer.data.images.decode import BrokenImageError
from senet_transfer.engine.inference.inputs import check_all_read, make_output_folder
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.results import write_results
from senet_transfer.evaluation.classification_evaluator import TOP
from senet_transfer.utils.progress import progress


@torch.inference_mode()
def classify_images(
    loaded: LoadedModel, images: list[str], output_dir: str, *, quiet: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """Classify images, and write the five most probable classes for each image.

    Args:
        loaded: A classifier returned by :func:`~.inputs.load_trained`.
        images: The image paths.
        output_dir: The output folder for ``predictions.json``.
        quiet: If True, show no progress bar.

    Returns:
        The path of the JSON file and its contents: a list with one dict per image. ``file_name``
        is the image path, and ``top`` is a list of dicts with ``class``, ``label`` and
        ``probability``, sorted by decreasing probability.

    Raises:
        UserError: If any image can't be read. The error lists the unreadable images and is raised
            after all other images have been processed.
    """
    make_output_folder(output_dir)
    model, transform, classes = loaded.model, eval_transform(loaded.cfg), loaded.classes
    found, broken = [], []
    for path in progress(images, unit="image", quiet=quiet):
        try:
            image = transform(Path(path).read_bytes())
        except (OSError, BrokenImageError) as error:
            broken.append(f"{path} can't be read as an image: {error}. Remove it.")
            continue
        probabilities = model({"image": image[None]})[0].softmax(0).cpu()
        best = probabilities.topk(min(TOP, len(classes)))
        top = [
            {"class": classes[label], "label": label, "probability": probability}
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        found.append({"file_name": path, "top": top})
    json_file = os.path.join(output_dir, "predictions.json")
    write_results(json_file, found)
    check_all_read(broken, len(images), json_file)
    return json_file, found
