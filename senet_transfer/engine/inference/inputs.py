"""Inputs for prediction: the trained model and the image files."""

import glob
import os
import re
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from senet_transfer.config.architectures import PROPOSALS, predicts
from senet_transfer.data.detection.coco import register_shapes
from senet_transfer.data.detection.dataset_checks import category_ids
from senet_transfer.data.images.file_types import is_array_name, is_hidden, is_image_name
from senet_transfer.engine.model_from import LoadedModel, config_next_to, find_model
from senet_transfer.engine.run_checks import check_augmentation
from senet_transfer.errors import UserError

# Number of images to list in an error.
_LISTED = 10


def load_trained(weights: str, config_file: str = "", options: Sequence[str] = ()) -> LoadedModel:
    """Load a trained model and its class names.

    Args:
        weights: The path of a checkpoint.
        config_file: The checkpoint's config. If empty, the ``config.yaml`` that training wrote
            next to the checkpoint is used.
        options: Alternating keys and values that override the config.

    Raises:
        UserError: If a file is missing or does not match the config, or if the config has no
            class names.
    """
    if not os.path.isfile(weights):
        raise UserError(f"The checkpoint {weights} does not exist. Give the path of a .pth file.")
    config_file = config_file or config_next_to(weights)
    if not config_file:
        raise UserError(
            f"There is no config.yaml next to {weights}, where training writes it. Give the "
            "checkpoint's config with --config-file."
        )
    found = find_model(config_file=config_file, weights=weights, options=options)
    if not found.cfg.DATASETS.CLASSES:
        _take_classes(found.cfg)
    found = found.examined()
    named = found.cfg.DATASETS.CLASSES or found.cfg.DATASETS.STUFF_CLASSES
    # The boxes of a region proposal network have no classes.
    if not named and predicts(found.cfg) != {PROPOSALS}:
        raise UserError(
            f"{config_file} has no class names (DATASETS.CLASSES is empty). Use the config.yaml "
            "in the run's output folder."
        )
    check_augmentation(found.cfg)
    return found.build()


def _take_classes(cfg: CfgNode) -> None:
    """Copy the data sets' class names to the config if they are known without reading files."""
    register_shapes()
    for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]:
        if name in MetadataCatalog and MetadataCatalog.get(name).get("thing_classes"):
            cfg.DATASETS.CLASSES = list(MetadataCatalog.get(name).thing_classes)
            cfg.DATASETS.CATEGORY_IDS = category_ids(name)
            return


def find_images(inputs: Iterable[str]) -> list[str]:
    """Return a sorted list of the image files given by paths, folders and glob patterns.

    Raises:
        UserError: If an input matches no image.
    """
    found: set[str] = set()
    for name in inputs:
        if os.path.isdir(name):
            entries = os.listdir(name)
            images = [entry for entry in entries if is_image_name(entry)]
            # NumPy arrays are images if there are no other images.
            images = images or [entry for entry in entries if is_array_name(entry)]
            paths = [os.path.join(name, entry) for entry in images]
        else:
            # Check for a file first, because its name may contain glob characters.
            paths = [name] if os.path.isfile(name) else _matches(name)
        paths = [path for path in paths if os.path.isfile(path)]
        if not paths:
            raise UserError(
                f"No image matches {name}. Expected an image file, a folder with images "
                "such as .jpg or .png files, or a pattern such as 'images/*.jpg'."
            )
        found.update(paths)
    return sorted(found)


def _matches(pattern: str) -> list[str]:
    """Return the files that match a glob pattern, except for hidden files below its folder."""
    folder = os.path.dirname(re.split(r"[*?\[]", pattern)[0])
    return [
        path for path in glob.glob(pattern, recursive=True) if not is_hidden(path[len(folder) :])
    ]


def make_output_folder(path: str) -> None:
    """Create the output folder for predictions, and raise a UserError if this fails."""
    try:
        os.makedirs(path or ".", exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The output folder {path} can't be created: {error}. Choose a different folder."
        ) from error


def check_all_read(broken: list[str], images: int, json_file: str) -> None:
    """Raise a UserError with the reasons if any images could not be read or processed."""
    if broken:
        more = f"\n... and {len(broken) - _LISTED} more" if len(broken) > _LISTED else ""
        raise UserError(
            f"{len(broken)} of {images} images can't be read or processed. The predictions for the "
            f"others are in {json_file}. The reasons:\n" + "\n".join(broken[:_LISTED]) + more
        )
