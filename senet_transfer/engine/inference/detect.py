"""Object detection and segmentation on image files."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform, Transform
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from PIL import Image

from senet_transfer.config.architectures import PROPOSALS, predicts
from senet_transfer.data.detection.fast_images import ChannelResizeShortestEdge
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.engine.inference.annotations import (
    object_annotations,
    objects,
    segment_annotations,
    segments,
)
from senet_transfer.engine.inference.augmentation import with_augmentation
from senet_transfer.engine.inference.drawing import ClassNames, PredictionDrawing
from senet_transfer.engine.inference.inputs import check_all_read, make_output_folder
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.results import write_results
from senet_transfer.errors import UserError
from senet_transfer.preprocessing import channels_of
from senet_transfer.utils.progress import progress

logger = logging.getLogger(__name__)


class _Resize(ResizeShortestEdge):
    """Detectron2's resizing with sides of at least 1 pixel, for very elongated images."""

    def get_transform(self, image: np.ndarray) -> Transform:
        found = super().get_transform(image)
        if not isinstance(found, ResizeTransform) or min(found.new_h, found.new_w) > 0:
            return found
        new_h, new_w = max(found.new_h, 1), max(found.new_w, 1)
        return type(found)(found.h, found.w, new_h, new_w, found.interp)


class _ResizeChannels(_Resize, ChannelResizeShortestEdge):
    """The same for images with any number of channels."""


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
        resize = _ResizeChannels if channels_of(cfg.INPUT.FORMAT) else _Resize
        self.aug = resize(sides, cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    def __call__(self, original_image: np.ndarray) -> dict:
        """Detect objects in a BGR image, or one with ``INPUT.CHANNELS``, uint8 ``(H, W, C)``."""
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

    The JSON file contains COCO's ``images``, ``annotations`` and ``categories``. It uses the
    category ids of the training data set, and image ids from 1. Objects have a ``score`` and, if
    the model predicts them, a ``segmentation`` or ``keypoints``, whose names are in ``categories``.
    The classes of a semantic segmentation follow those of the objects, and have one annotation
    per image. The boxes of a region proposal network have the single class "object".

    Args:
        loaded: A model returned by :func:`~.inputs.load_trained`.
        images: The image paths.
        output_dir: The output folder for ``predictions.json`` and the drawings. Each drawing is
            named after its image.
        threshold: The minimum score, between 0 and 1, of the detections to draw and write.
        quiet: If True, show no progress bar.

    Returns:
        The path of the JSON file.

    Raises:
        UserError: If the threshold is invalid, or if any image can't be processed. In the latter
            case, the error lists these images and is raised after all other images have been
            processed.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"The threshold is {threshold}; expected a score between 0 and 1.")
    drawn = _output_names(images, output_dir)
    make_output_folder(output_dir)
    predictor = Predictor(loaded)
    classes = ClassNames.of(*_names(loaded.cfg))
    records, annotations, broken = [], [], []
    for image_id, path in enumerate(progress(images, unit="image", quiet=quiet), start=1):
        try:
            image = _read(path, loaded.cfg)
            prediction = _Prediction.of(predictor(image), threshold)
        # A failed prediction must not affect the other images.
        except Exception as error:
            broken.append(_problem(path, "no prediction", error))
            continue
        height, width = image.shape[:2]
        records.append({"id": image_id, "file_name": path, "height": height, "width": width})
        annotations += prediction.annotations(image_id, len(classes.things))
        try:
            shown = _shown(image) if channels_of(loaded.cfg.INPUT.FORMAT) else image
            _draw(shown, prediction, classes, drawn[path])
        except Exception as error:
            broken.append(_problem(path, "no drawing, only its predictions", error))
    json_file = os.path.join(output_dir, "predictions.json")
    _write_json(json_file, records, annotations, _categories(loaded.cfg))
    check_all_read(broken, len(images), json_file)
    return json_file


@dataclass(frozen=True)
class _Prediction:
    """Predictions for an image, on the CPU: objects, and the mask of each class of stuff."""

    found: Instances | None
    stuff: dict[int, np.ndarray]

    @classmethod
    def of(cls, output: dict[str, Any], threshold: float) -> "_Prediction":
        return cls(objects(output, threshold), segments(output))

    def annotations(self, image_id: int, things: int) -> list[dict[str, Any]]:
        found = [] if self.found is None else object_annotations(self.found, image_id)
        return found + segment_annotations(self.stuff, image_id, things)


def _names(cfg: CfgNode) -> tuple[list[str], list[str]]:
    """Return the class names of a model's objects and of its semantic segmentation."""
    if predicts(cfg) == {PROPOSALS}:
        return ["object"], []
    return list(cfg.DATASETS.CLASSES), list(cfg.DATASETS.STUFF_CLASSES)


def _categories(cfg: CfgNode) -> list[dict[str, Any]]:
    things, stuff = _names(cfg)
    ids = list(cfg.DATASETS.CATEGORY_IDS)
    if len(ids) != len(things):
        ids = list(range(1, len(things) + 1))
    first = max(ids, default=0) + 1
    ids += range(first, first + len(stuff))
    categories: list[dict[str, Any]] = [
        {"id": id, "name": name} for id, name in zip(ids, [*things, *stuff], strict=True)
    ]
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.KEYPOINTS:
        for category in categories[: len(things)]:
            category["keypoints"] = list(cfg.DATASETS.KEYPOINTS)
            category["skeleton"] = []
    return categories


def _problem(path: str, lacks: str, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    logger.info("The traceback for %s:", path, exc_info=error)
    return f"{path} has {lacks}: {type(error).__name__}: {error or 'no message'}"


def _write_json(
    path: str, images: list[dict], annotations: list[dict], categories: list[dict]
) -> None:
    for index, annotation in enumerate(annotations, start=1):
        annotation["id"] = index
        annotation["category_id"] = categories[annotation["category_id"]]["id"]
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


def _read(path: str, cfg: CfgNode) -> np.ndarray:
    image_format = cfg.INPUT.FORMAT if channels_of(cfg.INPUT.FORMAT) else "BGR"
    try:
        return read_image(path, image_format, cfg.INPUT.VALUE_RANGE)
    # Decoders raise many kinds of exceptions for corrupted files.
    except Exception as error:
        raise UserError(f"{path} can't be read as an image: {error}. Remove it.") from error


def _shown(image: np.ndarray) -> np.ndarray:
    """Return the first three channels of an image as a BGR image; a single one as grey."""
    if image.shape[2] == 1:
        return image.repeat(3, axis=2)
    missing = max(3 - image.shape[2], 0)
    return np.pad(image, ((0, 0), (0, 0), (0, missing)))[:, :, 2::-1]


def _draw(image: np.ndarray, prediction: _Prediction, classes: ClassNames, path: str) -> None:
    drawing = PredictionDrawing(image[:, :, ::-1], classes)
    drawing.draw_segments(prediction.stuff)
    if prediction.found is not None:
        drawing.draw_instances(prediction.found)
    if not cv2.imwrite(path, drawing.image[:, :, ::-1]):
        raise UserError(
            f"The drawing {path} can't be written. Check that its folder is writable and that the "
            "disk is not full."
        )
