"""Detectron2's dataset mapper, with images that are read strictly or named in an error.

What differs from Detectron2's own `DatasetMapper` and `read_image`:

- An image that cannot be read in full raises a `UserError` with its file, its id and the
  annotation file it is listed in. Cut-off files are errors even where other code has set Pillow's
  `ImageFile.LOAD_TRUNCATED_IMAGES`, which would fill the missing part with grey.
- 16-bit greyscale images keep their upper 8 bits, as 16-bit colour images do in Pillow, where
  Pillow's own conversion turns all that is above 255 into white.
- 32-bit integer and floating-point images, whose range nothing tells, are refused.

Everything else, including the pixels of all other images, is Detectron2's.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from senet_transfer.errors import UserError

# What turns an image of each EXIF orientation upright.
_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ROTATES = (5, 6, 7, 8)  # the orientations that swap width and height


class CheckedDatasetMapper(DatasetMapper):
    """As Detectron2's, but says which image is broken and what to do about it.

    Args:
        is_train: whether annotations are to be mapped, too.
        annotation_files: image folder -> the annotation files that list its images, for messages.
        **kwargs: as in `DatasetMapper`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        annotation_files: Mapping[str, list[str]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(is_train, **kwargs)
        self.annotation_files = dict(annotation_files or {})

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        # Kept here because a data loader's worker may not have the catalog's contents.
        annotation_files: dict[str, list[str]] = {}
        for name in names:
            if name in MetadataCatalog:
                metadata = MetadataCatalog.get(name)
                folder, json_file = metadata.get("image_root"), metadata.get("json_file")
                if folder and json_file:
                    annotation_files.setdefault(folder, []).append(json_file)
        return {**super().from_config(cfg, is_train), "annotation_files": annotation_files}

    def __call__(self, dataset_dict: dict) -> dict:
        """Maps one image's dictionary as `DatasetMapper` does.

        Raises:
            UserError: if its image cannot be read or is of another size than the dictionary says.
        """
        dataset_dict = copy.deepcopy(dataset_dict)  # the code below changes it
        image = self._read(dataset_dict)
        sem_seg = None
        if "sem_seg_file_name" in dataset_dict:
            path = dataset_dict.pop("sem_seg_file_name")
            sem_seg = detection_utils.read_image(path, "L").squeeze(2)

        aug_input = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(aug_input)
        image, sem_seg = aug_input.image, aug_input.sem_seg
        image_shape = image.shape[:2]
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(sem_seg.astype("long"))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image_shape)
        return dataset_dict

    def _read(self, dataset_dict: dict) -> np.ndarray:
        path = dataset_dict["file_name"]
        try:
            image = read_image(path, self.image_format)
        except MemoryError:
            raise  # no fault of the file's
        # Decoders raise whatever the damage makes them stumble over.
        except Exception as error:
            raise UserError(
                f"{self._describe(dataset_dict)} cannot be read: {_reason(path, error)}. Expected "
                f"{_expected(dataset_dict)}. Restore the file from where it came from, or drop the "
                "image from the annotation file."
            ) from error
        try:
            detection_utils.check_image_size(dataset_dict, image)
        except detection_utils.SizeMismatchError:
            height, width = image.shape[:2]
            raise UserError(
                f"{self._describe(dataset_dict)} is {width}x{height} pixels (width x height); "
                f"expected {_expected(dataset_dict)}, as annotated. "
                f"{_size_advice(dataset_dict, (width, height))}"
            ) from None
        return image

    def _describe(self, dataset_dict: dict) -> str:
        path, known = dataset_dict["file_name"], []
        if "image_id" in dataset_dict:
            known.append(f"id {dataset_dict['image_id']}")
        for folder, json_files in self.annotation_files.items():
            if path.startswith(os.path.join(folder, "")):
                known.append(f"listed in {' or '.join(json_files)}")
        return f"Image {path}" + (f" ({', '.join(known)})" if known else "")


def read_image(path: str, image_format: str) -> np.ndarray:
    """Reads a whole image into 8 bits a channel, turned upright as its EXIF data say.

    Args:
        path: of a file in any format that Pillow reads.
        image_format: "BGR", "RGB", or what else Detectron2's `read_image` takes.

    Returns:
        (H, W, C) as Detectron2's `read_image` returns it: uint8, 0-255, but for "YUV-BT.601".

    Raises:
        UserError: if the pixels are 32-bit numbers.
        Exception: whatever Pillow raises for a file that is missing, broken or cut off.
    """
    with _no_truncated_images(), PathManager.open(path, "rb") as file:
        image: Image.Image = Image.open(file)
        image.load()
        orientation = _exif_orientation(image)
        if orientation in _EXIF_TURNS:
            image = image.transpose(_EXIF_TURNS[orientation])
        return detection_utils.convert_PIL_to_numpy(_to_8_bit(image), image_format)


def _exif_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation, 1-8; None without one, or with EXIF data that are broken."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of many types for broken EXIF data
        return None


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise UserError(
            f"its pixels are {kind}, of which nothing tells what is black and what is white; "
            "convert it to 8 bits a channel"
        )
    return image


@contextmanager
def _no_truncated_images() -> Iterator[None]:
    """Makes Pillow raise for a file that ends early, whatever other code asked of it."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "it is empty (0 bytes)"
    if isinstance(error, Image.DecompressionBombError):
        said = str(error).rstrip(".")
        return f"{said}; if it is meant to be so large, raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, UnidentifiedImageError):
        with PathManager.open(path, "rb") as file:
            head = file.read(20)
        return f"it begins with {head!r}, which is no image format that Pillow knows"
    return str(error) or type(error).__name__


def _expected(dataset_dict: dict) -> str:
    if "width" in dataset_dict and "height" in dataset_dict:
        return f"an image of {dataset_dict['width']}x{dataset_dict['height']} pixels"
    return "an image"


def _size_advice(dataset_dict: dict, found: tuple[int, int]) -> str:
    """What to do about an image of another size than annotated."""
    if found[::-1] != (dataset_dict["width"], dataset_dict["height"]):
        return (
            "Its boxes would be in the wrong places. Annotate this file, or restore the one that "
            "was annotated."
        )
    orientation = None
    with suppress(Exception), PathManager.open(dataset_dict["file_name"], "rb") as file:
        orientation = _exif_orientation(Image.open(file))
    if orientation in _EXIF_ROTATES:
        return (
            f"Its EXIF orientation is {orientation}, and Detectron2 turns it upright, while it was "
            "annotated lying. Remove the tag from the file if the boxes fit the image as stored, "
            "or annotate it upright."
        )
    return "Width and height are the wrong way round: swap them in the annotation file."
