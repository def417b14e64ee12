"""Predictions on a user's own images."""

import glob
import logging
import os
from collections.abc import Iterable

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

from senet_transfer.config.load import load_config
from senet_transfer.data.detection.coco import register_shapes
from senet_transfer.data.detection.dataset_checks import category_ids
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.results import write_results
from senet_transfer.engine.run_checks import check_augmentation
from senet_transfer.engine.setup import use_available_device
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress
from senet_transfer.weights import apply_file_geometry

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

logger = logging.getLogger(__name__)


class Predictor(DefaultPredictor):
    """Detectron2's predictor with strictly loaded weights and, where asked for, augmentation."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: of a trained detector; ``MODEL.WEIGHTS`` is its checkpoint and ``TEST.AUG`` turns
                test-time augmentation on.
        """
        # The parent loads leniently; it is given no file, and the file is loaded after it.
        weights = cfg.MODEL.WEIGHTS
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = "", ()
        super().__init__(cfg)
        Checkpointer(self.model, family=cfg.MODEL.WEIGHTS_FAMILY).load(weights)
        if cfg.TEST.AUG.ENABLED:
            check_augmentation(cfg)
            self.model = GeneralizedRCNNWithTTA(cfg, self.model)


def load_trained(weights: str, config_file: str = "", options: Iterable[str] = ()) -> CfgNode:
    """The config of a trained model.

    Args:
        weights: its checkpoint.
        config_file: empty for the ``config.yaml`` that training wrote beside the checkpoint.
        options: alternating keys and values that override the config.

    Raises:
        UserError: a file is missing, or the config names no classes.
    """
    if not os.path.isfile(weights):
        raise UserError(f"There is no checkpoint {weights}. Give the path of a .pth file.")
    beside = os.path.join(os.path.dirname(weights), "config.yaml")
    if not config_file and not os.path.isfile(beside):
        raise UserError(
            f"There is no {beside}, which training writes beside its checkpoints. Name the "
            "config of the checkpoint with --config-file."
        )
    cfg = load_config(config_file or beside, list(options))
    if not cfg.DATASETS.CLASSES:
        _take_classes(cfg)
    cfg.MODEL.WEIGHTS = weights
    apply_file_geometry(cfg)
    use_available_device(cfg, logger)
    if not cfg.DATASETS.CLASSES:
        raise UserError(
            f"{config_file or beside} does not name the classes (DATASETS.CLASSES), as the "
            "config.yaml in a run's output folder does. Use that one."
        )
    return cfg


def _take_classes(cfg: CfgNode) -> None:
    """The classes of the data sets that a recipe names, where these are known without files."""
    register_shapes()
    for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]:
        if name in MetadataCatalog and MetadataCatalog.get(name).get("thing_classes"):
            cfg.DATASETS.CLASSES = list(MetadataCatalog.get(name).thing_classes)
            cfg.DATASETS.CATEGORY_IDS = category_ids(name)
            return


def find_images(inputs: Iterable[str]) -> list[str]:
    """The image files that paths, folders and shell patterns name, sorted, each once.

    Raises:
        UserError: one of them names no image.
    """
    found: set[str] = set()
    for name in inputs:
        if os.path.isdir(name):
            paths = [os.path.join(name, entry) for entry in os.listdir(name)]
            paths = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
        else:
            # A file's own name comes first: it may hold characters that a pattern has, too.
            paths = [name] if os.path.isfile(name) else glob.glob(name, recursive=True)
        paths = [path for path in paths if os.path.isfile(path)]
        if not paths:
            raise UserError(
                f"{name} names no image. Expected an image file, a folder that holds images "
                f"({', '.join(IMAGE_SUFFIXES)}), or a pattern such as 'images/*.jpg'."
            )
        found.update(paths)
    return sorted(found)


def predict_images(
    cfg: CfgNode, images: list[str], output_dir: str, *, threshold: float, quiet: bool = False
) -> str:
    """Detects objects in images, draws them, and writes them in COCO's format.

    Args:
        cfg: as of :func:`load_trained`.
        images: paths.
        output_dir: takes the drawn images, under the names of the originals, and
            ``predictions.json`` with COCO's ``images``, ``annotations`` (each with ``score``)
            and ``categories``, under the ids of the data set that the model was trained on. Ids
            of images are new.
        threshold: the score, 0-1, below which a detection is neither drawn nor written.
        quiet: no progress bar.

    Returns:
        The path of the JSON.

    Raises:
        UserError: a value makes no sense; or images can't be read, which are named once all
            others are predicted.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"The threshold is {threshold}, expected a score from 0 to 1.")
    drawn = _output_names(images, output_dir)
    make_output_folder(output_dir)
    predictor = Predictor(cfg)
    categories = _categories(cfg)
    classes = [category["name"] for category in categories]
    records, annotations, broken = [], [], []
    for image_id, path in enumerate(progress(images, unit="image", quiet=quiet), start=1):
        try:
            image = _read(path)
        except UserError as error:
            broken.append(str(error))
            continue
        instances = predictor(image)["instances"].to("cpu")
        instances = instances[instances.scores >= threshold]
        _draw(image, instances, classes, drawn[path])
        height, width = image.shape[:2]
        records.append({"id": image_id, "file_name": path, "height": height, "width": width})
        annotations += instances_to_coco_json(instances, image_id)
    json_file = os.path.join(output_dir, "predictions.json")
    _write_json(json_file, records, annotations, categories)
    check_all_read(broken, len(images), json_file)
    return json_file


def make_output_folder(path: str) -> None:
    """Makes the folder that predictions are written to; raises UserError where it can't be."""
    try:
        os.makedirs(path or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder {path} can't be made: {error}.") from error


def check_all_read(broken: list[str], images: int, json_file: str) -> None:
    """Raises UserError where images were left out, with what was wrong with each."""
    if broken:
        raise UserError(
            f"{len(broken)} of {images} images can't be read; {json_file} holds the predictions "
            "of the others:\n" + "\n".join(broken[:10])
        )


def _categories(cfg: CfgNode) -> list[dict]:
    classes, ids = list(cfg.DATASETS.CLASSES), list(cfg.DATASETS.CATEGORY_IDS)
    if len(ids) != len(classes):
        ids = list(range(1, len(classes) + 1))
    return [{"id": id, "name": name} for id, name in zip(ids, classes, strict=True)]


def _write_json(
    path: str, images: list[dict], annotations: list[dict], categories: list[dict]
) -> None:
    for index, annotation in enumerate(annotations, start=1):
        annotation["id"] = index
        annotation["category_id"] = categories[annotation["category_id"]]["id"]
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation["iscrowd"] = 0
    results = {"images": images, "annotations": annotations, "categories": categories}
    write_results(path, results, indent=None)


def _output_names(images: list[str], output_dir: str) -> dict[str, str]:
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path in images:
        name = os.path.join(output_dir, os.path.splitext(os.path.basename(path))[0] + ".jpg")
        if name in taken:
            # Another suffix, such as a.png beside a.jpg.
            name = os.path.join(output_dir, os.path.basename(path) + ".jpg")
        if name in taken:
            raise UserError(
                f"Two images would be drawn to {name}; one is {path}. Predict them into two "
                "folders, or rename one."
            )
        if os.path.abspath(name) == os.path.abspath(path):
            raise UserError(f"{path} would be overwritten by its drawing. Take another --output.")
        taken.add(name)
        names[path] = name
    return names


def _read(path: str) -> np.ndarray:
    try:
        return read_image(path, "BGR")
    except MemoryError:
        raise
    # Decoders raise whatever the damage makes them stumble over.
    except Exception as error:
        raise UserError(f"{path} can't be read as an image: {error}. Leave it out.") from error


def _draw(image: np.ndarray, instances: Instances, classes: list[str], path: str) -> None:
    metadata = Metadata(thing_classes=classes)
    # Small images are enlarged, so that the names of the classes can be read.
    # Enlarged by at most 4, as a strip of a few pixels would become huge.
    scale = min(4.0, max(1.0, 480 / min(image.shape[:2])))
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    drawing = visualizer.draw_instance_predictions(instances).get_image()
    if not cv2.imwrite(path, drawing[:, :, ::-1]):
        raise UserError(f"The drawing {path} can't be written. Check the folder and the disk.")
