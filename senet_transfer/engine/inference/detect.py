"""Object detection on image files."""

import os
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

from senet_transfer.data.detection.mapper import read_image
from senet_transfer.engine.inference.augmentation import with_augmentation
from senet_transfer.engine.inference.inputs import check_all_read, make_output_folder
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.results import write_results
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress


class Predictor(DefaultPredictor):
    """Predictor for a loaded detector, with test-time augmentation if ``TEST.AUG`` is enabled.

    DefaultPredictor's constructor is not called because it would build the model again and load
    the weights without checking them.
    """

    def __init__(self, loaded: LoadedModel):
        """
        Args:
            loaded: The detector.
        """
        self.cfg = cfg = loaded.cfg
        self.model = loaded.model
        if cfg.TEST.AUG.ENABLED:
            self.model = with_augmentation(cfg, self.model)
        sides = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
        self.aug = ResizeShortestEdge(sides, cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    def __call__(self, original_image: np.ndarray) -> dict:
        """Detect objects in a BGR image, uint8 ``(H, W, 3)``."""
        if self.input_format == "L":
            grey = Image.fromarray(original_image[:, :, ::-1]).convert("L")
            original_image = np.asarray(grey)[:, :, None]
        return super().__call__(original_image)


def predict_images(
    loaded: LoadedModel,
    images: list[str],
    output_dir: str,
    *,
    threshold: float,
    quiet: bool = False,
) -> str:
    """Detect objects in images, draw the detections, and write them in COCO format.

    The JSON file contains COCO's ``images``, ``annotations`` (each with a ``score``) and
    ``categories``. It uses the category ids of the training data set, and image ids from 1.

    Args:
        loaded: A detector returned by :func:`~.inputs.load_trained`.
        images: The image paths.
        output_dir: The output folder for ``predictions.json`` and the drawings. Each drawing is
            named after its image.
        threshold: The minimum score, between 0 and 1, of the detections to draw and write.
        quiet: If True, show no progress bar.

    Returns:
        The path of the JSON file.

    Raises:
        UserError: If the threshold is invalid, or if any image can't be read. In the latter case,
            the error lists the unreadable images and is raised after all other images have been
            processed.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"The threshold is {threshold}; expected a score between 0 and 1.")
    drawn = _output_names(images, output_dir)
    make_output_folder(output_dir)
    predictor = Predictor(loaded)
    categories = _categories(loaded.cfg)
    classes = [category["name"] for category in categories]
    records, annotations, broken = [], [], []
    for image_id, path in enumerate(progress(images, unit="image", quiet=quiet), start=1):
        try:
            image = _read(path, loaded.cfg.INPUT.VALUE_RANGE)
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
            # The inputs include, for example, both a.png and a.jpg.
            name = os.path.join(output_dir, os.path.basename(path) + ".jpg")
        if name in taken:
            raise UserError(
                f"Two images would have the same drawing path {name}; one of them is {path}. "
                "Rename one of the images, or use two output folders."
            )
        if os.path.abspath(name) == os.path.abspath(path):
            raise UserError(
                f"The image {path} would be overwritten by its drawing. Change --output."
            )
        taken.add(name)
        names[path] = name
    return names


def _read(path: str, value_range: Sequence[float]) -> np.ndarray:
    try:
        return read_image(path, "BGR", value_range)
    except MemoryError:
        raise
    # Decoders raise many kinds of exceptions for corrupted files.
    except Exception as error:
        raise UserError(f"{path} can't be read as an image: {error}. Remove it.") from error


def _draw(image: np.ndarray, instances: Instances, classes: list[str], path: str) -> None:
    metadata = Metadata(thing_classes=classes)
    # Enlarge small images to keep class names legible, but at most 4 times: otherwise, an image
    # only a few pixels high would become huge.
    scale = min(4.0, max(1.0, 480 / min(image.shape[:2])))
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    drawing = visualizer.draw_instance_predictions(instances).get_image()
    if not cv2.imwrite(path, drawing[:, :, ::-1]):
        raise UserError(
            f"The drawing {path} can't be written. Check that its folder is writable and that the "
            "disk is not full."
        )
