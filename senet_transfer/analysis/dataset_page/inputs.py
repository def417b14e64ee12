"""Training inputs from the data loader, and the same images without augmentation."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BitMasks, Instances, PolygonMasks, RotatedBoxes
from detectron2.utils.visualizer import GenericMask

from senet_transfer.config import is_classification
from senet_transfer.data import build as classification
from senet_transfer.data.detection import loader as detection
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.engine.trainer import Trainer
from senet_transfer.layers.cutout import cut_out


@dataclass(frozen=True)
class View:
    """An input image of the network, with its annotations.

    Attributes:
        pixels: RGB image, uint8 ``(H, W, 3)``.
        name: Path or key of the image.
        classes: Class of each object. For a classifier, the label of the image.
        boxes: Left, top, right and bottom of each object in pixels, ``(N, 4)``.
        outlines: Polygons of the masks or rotated boxes, as (object index, points ``(P, 2)``).
    """

    pixels: np.ndarray
    name: str
    classes: list[int]
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    outlines: list[tuple[int, np.ndarray]] = field(default_factory=list)


def training_views(cfg: CfgNode, count: int) -> list[tuple[View, View]]:
    """Return the first training inputs of a run, each paired with the unaugmented image.

    The training loader uses the config's seed, or seed 0 if the config has no seed. The unaugmented
    images come from a second loader with the same seed and without random augmentation, which
    returns the same images in the same order.

    Args:
        cfg: Config whose datasets are registered.
        count: Number of images.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # Inputs do not depend on the number of workers.
    cfg.SOLVER.COMPILE = "none"
    cfg.SOLVER.MAX_ITER = 1  # avoid a warning about long schedules
    seed = max(cfg.SEED, 0)
    views: Callable[[CfgNode, Any], Iterator[list[View]]] = (
        _image_views if is_classification(cfg) else _object_views
    )
    loaders = Trainer.build_train_loader(cfg, seed), _plain_loader(cfg, seed)
    streams = (islice(chain.from_iterable(views(cfg, loader)), count) for loader in loaders)
    return list(zip(*streams, strict=True))


def _plain_loader(cfg: CfgNode, seed: int) -> Iterable[Any]:
    if not is_classification(cfg):
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        mapper.is_train = True  # Keep annotations, but without augmentation.
        plain = cfg.clone()
        plain.INPUT.COPY_PASTE = 0.0
        return detection.build_train_loader(plain, mapper, seed=seed)
    if classification.in_memory(cfg):
        plain = cfg.clone()
        plain.INPUT.CLASSIFICATION.FLIP = 0.0
        plain.INPUT.CLASSIFICATION.PAD = plain.INPUT.CLASSIFICATION.CUTOUT = 0
        return classification.train_loader(plain, seed)
    transform = classification.eval_transform(cfg)
    if transform.mode == "ten_crop":
        transform = replace(transform, mode="short_side")
    return classification.train_loader(cfg, seed, transform=transform)


def _object_views(cfg: CfgNode, loader: Iterable[list[dict]]) -> Iterator[list[View]]:
    for batch in loader:
        yield [_object_view(item, cfg.INPUT.FORMAT) for item in batch]


def _object_view(item: dict[str, Any], image_format: str) -> View:
    pixels = _as_rgb(item["image"], image_format)
    found: Instances | None = item.get("instances")
    if found is None:
        return View(pixels, item["file_name"], [])
    boxes, outlines = found.gt_boxes, []
    if isinstance(boxes, RotatedBoxes):
        corners = [
            cv2.boxPoints(((x, y), (width, height), -angle))
            for x, y, width, height, angle in boxes.tensor.tolist()
        ]
        outlines = list(enumerate(corners))
        rows = [[*points.min(0), *points.max(0)] for points in corners]
    else:
        rows = boxes.tensor.tolist()
    if found.has("gt_masks"):
        outlines = [
            (index, np.asarray(polygon).reshape(-1, 2))
            for index, polygons in enumerate(_polygons(found.gt_masks))
            for polygon in polygons
        ]
    boxes = np.array(rows, np.float64).reshape(-1, 4)
    return View(pixels, item["file_name"], found.gt_classes.tolist(), boxes, outlines)


def _polygons(masks: PolygonMasks | BitMasks) -> list[list[np.ndarray]]:
    if isinstance(masks, PolygonMasks):
        return masks.polygons
    bits = masks.tensor.numpy().astype(np.uint8)
    return [GenericMask(mask, *mask.shape).polygons for mask in bits]


def _image_views(cfg: CfgNode, loader: Iterable[dict[str, Any]]) -> Iterator[list[View]]:
    for batch in loader:
        images = batch["image"]
        if "cutout" in batch:
            # The model erases squares in the normalised image, where the mean is 0.
            mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
            mean = mean.flip(0) if cfg.INPUT.FORMAT == "BGR" else mean
            size = cfg.INPUT.CLASSIFICATION.CUTOUT
            images = cut_out(images - mean, batch["cutout"], size) + mean
        names = batch.get("key", [""] * len(images))
        yield [
            View(_as_rgb(image, "RGB"), name, [label])
            for image, name, label in zip(images, names, batch["label"].tolist(), strict=True)
        ]


def _as_rgb(image: torch.Tensor, image_format: str) -> np.ndarray:
    """Convert an image ``(C, H, W)`` to RGB, uint8 ``(H, W, 3)``, for display.

    If the image has more than three channels, the first three are shown as red, green and blue.
    """
    channels = image if len(image) >= 3 else image[:1].expand(3, -1, -1)
    rgb = channels[:3].permute(1, 2, 0)
    if len(image) == 3 and image_format not in ("L", "RGB"):
        rgb = torch.as_tensor(convert_image_to_rgb(rgb, image_format).copy())
    return rgb.round().clamp(0, 255).byte().numpy()
