"""Classification datasets built from annotations in COCO format: object crops or whole images."""

import math
import os
from collections import Counter, defaultdict

import numpy as np
from PIL import Image

from senet_transfer.data.base import RawSample, SingleImages
from senet_transfer.data.detection.annotation_checks import read_coco_summary
from senet_transfer.data.detection.formats.source import read_annotations
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.decode import UPRIGHT, Reading, encode_exact
from senet_transfer.errors import UserError


class CocoCrops(SingleImages):
    """Classification dataset with one crop for each object in an annotation file.

    A crop is a square around an object's box, shifted or cropped to fit into the image. Square
    crops include some context and keep the aspect ratio when they are resized to a square input.
    Crowd annotations are excluded. Boxes with a side shorter than ``min_side`` pixels are also
    excluded, because they show little detail.
    """

    def __init__(
        self,
        json_file: str,
        image_dir: str,
        *,
        min_side: float = 16,
        reading: Reading = UPRIGHT,
    ):
        """
        Args:
            json_file: Annotation file in COCO instances format.
            image_dir: Folder with the annotated images.
            min_side: Minimum width and height of a box, in pixels.
            reading: Settings for reading the images.

        Raises:
            UserError: If the annotation file is invalid or contains no object that is large enough.
        """
        summary = read_coco_summary(json_file, image_dir, upright=reading.upright)
        content = read_annotations(json_file, image_dir, upright=reading.upright)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        self.files = {key: summary.renamed.get(name, name) for key, name in names.items()}
        self.objects = [
            (item["image_id"], tuple(item["bbox"]), summary.id_map[item["category_id"]])
            for item in content["annotations"]
            if not item.get("iscrowd") and min(item["bbox"][2:]) >= min_side
        ]
        if not self.objects:
            raise UserError(
                f"{json_file} contains no object whose box is at least {min_side} pixels wide and "
                "high. Reduce min_side or use a different file."
            )
        self.image_dir, self.reading = image_dir, reading
        super().__init__(summary.classes, len(self.objects), json_file)

    def labels(self) -> np.ndarray:
        return np.array([label for _, _, label in self.objects], np.int64)

    def read_sample(self, index: int) -> RawSample:
        image_id, box, label = self.objects[index]
        path = os.path.join(self.image_dir, self.files[image_id])
        try:
            image = Image.fromarray(read_image(path, "RGB", self.reading))
        except Exception as error:  # decoders raise exceptions of many types for damaged files
            raise UserError(
                f"Cannot read {path}, which is listed in {self.origin}: {error}. Restore the "
                "file, or remove the image from the annotation file."
            ) from error
        cut = image.crop(square_around(box, image.width, image.height))
        return RawSample(f"object_{index:09d}", label, encode_exact(cut), path)


# Upper area limits of COCO's size classes, in square pixels.
SIZES = {"small": 32**2, "medium": 96**2, "large": math.inf}


class CocoImages(SingleImages):
    """Classification dataset of whole images, labelled with the class or size of most objects.

    The label of an image is the class or size of more than half of its objects. Images without
    such a majority are excluded. Crowd annotations are ignored. A sample contains only the path of
    an image, not the encoded image.

    Attributes:
        by: Property of the objects that determines the labels, "class" or "size".
        left_out: Number of excluded images.
    """

    def __init__(self, json_file: str, image_dir: str, *, by: str, upright: bool = True):
        """
        Args:
            json_file: Annotation file in COCO instances format.
            image_dir: Folder with the annotated images.
            by: Property of the objects that determines the labels: "class", or "size" for COCO's
                size classes, which are small (an area below 32² pixels), medium (below 96² pixels)
                and large.
            upright: Whether the annotations refer to the images with EXIF orientation applied.

        Raises:
            UserError: If the annotation file is invalid, or if there is no image in which more than
                half of the objects have the same class or size.
        """
        self.by = by
        summary = read_coco_summary(json_file, image_dir, upright=upright)
        content = read_annotations(json_file, image_dir, upright=upright)
        votes: dict[int, Counter[int]] = defaultdict(Counter)
        for item in content["annotations"]:
            if not item.get("iscrowd"):
                label = _size(item) if by == "size" else summary.id_map[item["category_id"]]
                votes[item["image_id"]][label] += 1
        self.images = []
        for image in content["images"]:
            (label, count), *_ = votes[image["id"]].most_common(1) or [(0, 0)]
            if 2 * count > votes[image["id"]].total():
                name = summary.renamed.get(image["file_name"], image["file_name"])
                self.images.append((os.path.join(image_dir, name), label))
        self.left_out = len(content["images"]) - len(self.images)
        if not self.images:
            raise UserError(
                f"{json_file} contains no image in which more than half of the objects have the "
                f"same {by}. Use a different file, or omit --group-by to use crops of objects."
            )
        classes = list(SIZES) if by == "size" else summary.classes
        super().__init__(classes, len(self.images), json_file)

    def labels(self) -> np.ndarray:
        return np.array([label for _, label in self.images], np.int64)

    def read_sample(self, index: int) -> RawSample:
        path, label = self.images[index]
        return RawSample(f"image_{index:09d}", label, b"", path)


def _size(item: dict) -> int:
    """Return the index of an annotation's size class in ``SIZES``."""
    area = item.get("area") or item["bbox"][2] * item["bbox"][3]
    return next(index for index, limit in enumerate(SIZES.values()) if area < limit)


def square_around(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[int, int, int, int]:
    """Return the square around a box, shifted or cropped to fit into the image.

    Args:
        box: Box as (x, y, width, height) in pixels, as in COCO.
        width: Image width in pixels.
        height: Image height in pixels.

    Returns:
        The edges (left, top, right, bottom) of the square as integers, in pixels.
    """
    x, y, w, h = box
    side = max(w, h)
    left, top = x + (w - side) / 2, y + (h - side) / 2
    left, right = _within(left, left + side, width)
    top, bottom = _within(top, top + side, height)
    return left, top, right, bottom


def _within(low: float, high: float, limit: int) -> tuple[int, int]:
    """Shift an interval into the range from 0 to ``limit``, shorten it if needed, and round it."""
    shift = max(0.0, -low) - max(0.0, high - limit)
    # Halves are rounded up, because rounding half to even would change the length of some
    # intervals.
    low, high = (math.floor(end + shift + 0.5) for end in (low, high))
    low, high = max(0, low), min(limit, high)
    return min(low, limit - 1), max(high, low + 1)
