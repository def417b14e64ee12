"""Labelled crops of the objects in a data set in COCO format."""

import math
import os

import numpy as np
from PIL import Image

from senet_transfer.data.base import RawSample, SingleImages
from senet_transfer.data.detection.annotation_checks import read_coco_summary
from senet_transfer.data.detection.formats.source import read_annotations
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.decode import UPRIGHT, Reading, encode_exact
from senet_transfer.errors import UserError


class CocoCrops(SingleImages):
    """Data set with one crop for each object in an annotation file.

    A crop is the square around an object's box, limited to the image, so that a classification
    network sees the object undistorted and in context. Crowds are left out, and so are boxes with a
    side below ``min_side``, which show little detail.
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
            json_file: Annotation file in COCO's instances format.
            image_dir: Folder with its images.
            min_side: Minimum width and height of a box, in pixels.
            reading: Settings for reading the images.

        Raises:
            UserError: If the annotation file is invalid or contains no suitable object.
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


def square_around(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[int, int, int, int]:
    """Return the square around a box, shifted and cropped to fit within the image.

    Args:
        box: Box as (x, y, width, height) in pixels, as in COCO.
        width: Image width in pixels.
        height: Image height in pixels.

    Returns:
        The (left, top, right, bottom) edges in whole pixels, inside the image.
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
    # Halves are rounded up, because rounding half to even would change the length of some
    # intervals.
    low, high = (math.floor(end + shift + 0.5) for end in (low, high))
    low, high = max(0, low), min(limit, high)
    return min(low, limit - 1), max(high, low + 1)
