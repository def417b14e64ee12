"""Detectors from Detectron2's model zoo, which are downloaded on first use."""

import os
from pathlib import Path

import torch

from senet_transfer.errors import UserError
from senet_transfer.weights.hub.download import fetch


def is_zoo_name(name: str) -> bool:
    """Return whether a name has the form of a config name in Detectron2's model zoo."""
    folder = name.partition("/")[0]
    return bool(folder) and folder != name and not os.path.exists(name) and folder in _folders()


def zoo_model(name: str) -> tuple[str, Path]:
    """Return the paths of a detector's config and weights, after downloading the weights if needed.

    The weights are stored in torch.hub's cache. They can't be verified, because Detectron2
    publishes no hashes.

    Args:
        name: A name such as "COCO-Detection/faster_rcnn_R_50_FPN_3x"; the suffix ".yaml" is
            optional.

    Raises:
        UserError: If the name is unknown, its config is a LazyConfig, or the download fails.
    """
    from detectron2 import model_zoo

    name = name.removesuffix(".yaml")
    try:
        url = model_zoo.get_checkpoint_url(f"{name}.yaml")
        config_file = model_zoo.get_config_file(f"{name}.yaml")
    except RuntimeError as error:
        raise UserError(
            f"{name} is not a detector with a YAML config in Detectron2's model zoo. Expected a "
            "name such as COCO-Detection/faster_rcnn_R_50_FPN_3x; Detectron2's MODEL_ZOO.md lists "
            "all configs."
        ) from error
    path = Path(torch.hub.get_dir(), "checkpoints", "detectron2", name, url.rpartition("/")[2])
    return config_file, fetch(url, path, None)


def _folders() -> list[str]:
    """Return the names of the folders that contain the model zoo's configs."""
    import detectron2.model_zoo

    configs = Path(detectron2.model_zoo.__file__).parent / "configs"
    return [path.name for path in configs.iterdir() if path.is_dir()]
