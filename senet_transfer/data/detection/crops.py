"""Labelled crops of the objects of a data set in COCO format."""

import math
import os

import numpy as np
from PIL import Image

from senet_transfer.data.base import RawSample, SingleImages
from senet_transfer.data.detection.annotation_checks import read_coco_summary
from senet_transfer.data.detection.json_file import read_json_object
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.decode import encode_exact
from senet_transfer.errors import UserError


class CocoCrops(SingleImages):
    """A data set with a crop of every object of an annotation file.

    A crop is the square around the box, limited to the image, so that a classification network
    gets the object undistorted and with its context. Crowds and boxes with a side below
    ``min_side``, which show few details, are left out.
    """

    def __init__(self, json_file: str, image_dir: str, *, min_side: float = 16):
        """
        Args:
            json_file: Annotation file in COCO's instances format.
            image_dir: Folder of its images.
            min_side: Minimum side of a box, in pixels.

        Raises:
            UserError: If the annotation file is invalid, or contains no such object.
        """
        summary = read_coco_summary(json_file, image_dir)
        content = read_json_object(json_file)
        self.files = {image["id"]: image["file_name"] for image in content["images"]}
        self.objects = [
            (item["image_id"], tuple(item["bbox"]), summary.id_map[item["category_id"]])
            for item in content["annotations"]
            if not item.get("iscrowd") and min(item["bbox"][2:]) >= min_side
        ]
        if not self.objects:
            raise UserError(
                f"{json_file} contains no object with sides of {min_side} pixels or more. Reduce "
                "min_side, or name another file."
            )
        self.image_dir = image_dir
        super().__init__(summary.classes, len(self.objects), json_file)

    def labels(self) -> np.ndarray:
        return np.array([label for _, _, label in self.objects], np.int64)

    def read_sample(self, index: int) -> RawSample:
        image_id, box, label = self.objects[index]
        path = os.path.join(self.image_dir, self.files[image_id])
        try:
            image = Image.fromarray(read_image(path, "RGB"))
        except Exception as error:  # decoders raise exceptions of many types for damaged files
            raise UserError(
                f"{path}, listed in {self.origin}, can't be read: {error}. Restore it, or remove "
                "it from the annotation file."
            ) from error
        cut = image.crop(square_around(box, image.width, image.height))
        return RawSample(f"object_{index:09d}", label, encode_exact(cut), path)


def square_around(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[int, int, int, int]:
    """Return the square around a box, shifted and cropped to fit into the image.

    Args:
        box: X, y, width and height in pixels, as in COCO.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        Left, top, right and bottom in whole pixels, inside the image.
    """
    x, y, w, h = box
    side = max(w, h)
    left, top = x + (w - side) / 2, y + (h - side) / 2
    left, right = _within(left, left + side, width)
    top, bottom = _within(top, top + side, height)
    return left, top, right, bottom


def _within(low: float, high: float, limit: int) -> tuple[int, int]:
    """Shift an interval into the range from 0 to ``limit``, and shorten it if it is too long."""
    shift = max(0.0, -low) - max(0.0, high - limit)
    # Rounds half up, because rounding half to even would change the length of some intervals.
    low, high = (math.floor(end + shift + 0.5) for end in (low, high))
    low, high = max(0, low), min(limit, high)
    return min(low, limit - 1), max(high, low + 1)
