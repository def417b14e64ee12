"""Detectron2's dataset mapper with strict image reading and informative errors.

Differences from Detectron2's own `DatasetMapper` and `read_image`:

- An image that cannot be read completely raises a `UserError` with the image's path, id and
  annotation file. This applies to truncated files even if other code has set Pillow's
  `ImageFile.LOAD_TRUNCATED_IMAGES`, which fills the missing part with grey.
- 16-bit grayscale images are scaled to 8 bits. Pillow's conversion would clip all values above 255.
- 32-bit integer and floating-point images require ``INPUT.VALUE_RANGE``, because their value range
  is unknown.
- The EXIF orientation of TIFF files is applied only by Pillow. Detectron2 applies it a second time.
- If ``INPUT.EXIF`` is "ignore", the EXIF orientation of files other than TIFF is ignored.
- A vertical flip also swaps left and right keypoints, because it mirrors persons.
- For models with masks, ``INPUT.CROP`` also supports images without objects, for which Detectron2
  raises an error.
- Rotated boxes and images with any number of channels are supported.
- The labels in label images for semantic segmentation are validated.
- ``INPUT`` has keys for additional augmentation, which is disabled by default.

All other outputs are the same as Detectron2's, unless ``INPUT.FAST_RESIZE`` is set. JPEG files are
decoded faster, with identical pixels.
"""

import copy
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, Instances, Keypoints
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from senet_transfer.config.architectures import PIXELS, predicts, predicts_rotated_boxes
from senet_transfer.data.detection.augmentation.build import crops_images, with_augmentation
from senet_transfer.data.detection.fast_images import (
    decode_jpeg,
    with_channel_resize,
    with_fast_resize,
)
from senet_transfer.data.images.channels import decode_channels
from senet_transfer.data.images.decode import (
    SIDEWAYS,
    UPRIGHT,
    Reading,
    allowed_formats,
    exif_orientation,
    no_truncated_images,
    to_8_bit,
    turn_upright,
)
from senet_transfer.data.reading import reading_of
from senet_transfer.errors import UserError
from senet_transfer.preprocessing import channels_of


class UnreadableImageError(UserError):
    """Error for an image file that cannot be decoded. Training skips and counts such images.

    Attributes:
        reason: Path of the file and reason for the error, without advice on how to fix it.
    """

    reason = ""


class CheckedDatasetMapper(DatasetMapper):
    """Variant of Detectron2's `DatasetMapper` with informative errors for invalid data.

    Args:
        is_train: Whether to return annotations in addition to images.
        annotation_files: Dictionary from image folder to the annotation files that list its images;
            used in error messages.
        labels: Number of classes for semantic segmentation, and the label of ignored pixels; None
            to accept any label.
        rotated: Whether the model uses rotated boxes.
        reading: Settings for reading images.
        **kwargs: Other arguments of `DatasetMapper`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        annotation_files: Mapping[str, list[str]] | None = None,
        labels: tuple[int, int] | None = None,
        rotated: bool = False,
        reading: Reading = UPRIGHT,
        **kwargs: Any,
    ):
        super().__init__(is_train, **kwargs)
        self.annotation_files = dict(annotation_files or {})
        self.labels, self.rotated = labels, rotated
        self.reading = reading

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        # The annotation files are stored in the mapper, because the catalog may be empty in worker
        # processes.
        annotation_files: dict[str, list[str]] = {}
        for name in names:
            if name in MetadataCatalog:
                metadata = MetadataCatalog.get(name)
                folder, json_file = metadata.get("image_root"), metadata.get("json_file")
                if folder and json_file:
                    annotation_files.setdefault(folder, []).append(json_file)
        theirs = super().from_config(cfg, is_train)
        if is_train:
            theirs["augmentations"] = with_augmentation(cfg, theirs["augmentations"])
            theirs["recompute_boxes"] = crops_images(cfg) and cfg.MODEL.MASK_ON
        # A config of Detectron2 itself does not have this key.
        if is_train and cfg.INPUT.get("FAST_RESIZE", False) and not channels_of(cfg.INPUT.FORMAT):
            theirs["augmentations"] = with_fast_resize(theirs["augmentations"])
        if channels_of(cfg.INPUT.FORMAT):
            theirs["augmentations"] = with_channel_resize(theirs["augmentations"])
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            **theirs,
            "annotation_files": annotation_files,
            "labels": (head.NUM_CLASSES, head.IGNORE_VALUE) if PIXELS in predicts(cfg) else None,
            "rotated": predicts_rotated_boxes(cfg),
            "reading": reading_of(cfg),
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Convert a dataset dict to a model input, as `DatasetMapper` does.

        Raises:
            UserError: If the image cannot be read, its size differs from the size in the dataset
                dict, or its annotations are invalid.
        """
        dataset_dict = copy.deepcopy(dataset_dict)  # modified below
        image = self._read(dataset_dict)
        sem_seg = None
        if "sem_seg_file_name" in dataset_dict:
            path = dataset_dict.pop("sem_seg_file_name")
            sem_seg = read_labels(path, image.shape[:2], self.labels)

        aug_input = T.AugInput(image, sem_seg=sem_seg)
        try:
            transforms = self.augmentations(aug_input)
        except ValueError as error:  # such as a side of 0 pixels after resizing
            height, width = image.shape[:2]
            raise UserError(
                f"{self._describe(dataset_dict)} is {width}x{height} pixels and can't be "
                f"transformed: {error}. Crop or split the image, or increase INPUT.MAX_SIZE_TRAIN "
                "and INPUT.MAX_SIZE_TEST."
            ) from error
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

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        if self.rotated:
            self._transform_rotated(dataset_dict, transforms, image_shape)
            return
        self._check_keypoints(dataset_dict)
        if all(annotation.get("iscrowd", 0) for annotation in dataset_dict["annotations"]):
            # Detectron2 can't recompute the boxes of an image without objects.
            del dataset_dict["annotations"]
            dataset_dict["instances"] = detection_utils.annotations_to_instances([], image_shape)
            return
        if not self.use_instance_mask:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            self._swap_keypoints(dataset_dict["instances"], transforms)
            return
        try:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
        # Detectron2 and pycocotools raise exceptions of many types for invalid segmentations.
        except (AssertionError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._describe(dataset_dict)} has annotations that can't be used: {error} "
                f"(INPUT.MASK_FORMAT is {self.instance_mask_format!r}). Expected polygons with at "
                "least three points, or run-length encodings with INPUT.MASK_FORMAT bitmask. "
                "Correct the annotations of this image."
            ) from error
        self._swap_keypoints(dataset_dict["instances"], transforms)

    def _swap_keypoints(self, instances: Instances, transforms: T.TransformList) -> None:
        """Swap left and right keypoints after a vertical flip.

        Detectron2 itself swaps them only after a horizontal flip. Both flips together
        are a rotation by 180 degrees, which does not exchange left and right. In this case, the two
        swaps cancel each other.
        """
        flips = sum(isinstance(part, T.VFlipTransform) for part in transforms.transforms)
        if flips % 2 and instances.has("gt_keypoints") and self.keypoint_hflip_indices is not None:
            points = instances.gt_keypoints.tensor[:, list(self.keypoint_hflip_indices)]
            instances.gt_keypoints = Keypoints(points)

    def _transform_rotated(
        self, dataset_dict: dict, transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        annotations = [a for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
        for annotation in annotations:
            box = _rotated_box(annotation)
            annotation["bbox"] = transforms.apply_rotated_box(np.array([box]))[0]
        instances = detection_utils.annotations_to_instances_rotated(annotations, image_shape)
        dataset_dict["instances"] = detection_utils.filter_empty_instances(instances)

    def _check_keypoints(self, dataset_dict: dict) -> None:
        """Check the number of keypoints of each object.

        Objects without keypoints are given invisible keypoints.
        """
        if not self.use_keypoint or self.keypoint_hflip_indices is None:
            return
        length = 3 * len(self.keypoint_hflip_indices)
        for annotation in dataset_dict["annotations"]:
            annotation["keypoints"] = annotation.get("keypoints") or [0.0] * length
            if len(annotation["keypoints"]) != length:
                raise UserError(
                    f"{self._describe(dataset_dict)} has an object with "
                    f"{len(annotation['keypoints'])} keypoint values; expected {length}, three "
                    "per keypoint of the category (x, y, visibility). Correct the annotation file."
                )

    def _read(self, dataset_dict: dict) -> np.ndarray:
        return read_checked(
            dataset_dict,
            self.image_format,
            reading=self.reading,
            annotation_files=self.annotation_files,
        )

    def _describe(self, dataset_dict: dict) -> str:
        return _describe(dataset_dict, self.annotation_files)


def read_checked(
    dataset_dict: dict,
    image_format: str,
    *,
    reading: Reading = UPRIGHT,
    annotation_files: Mapping[str, list[str]],
) -> np.ndarray:
    """Read an image with :func:`read_image`, and compare its size with the annotated size.

    Args:
        dataset_dict: Detectron2's dataset dict for the image.
        image_format: See :func:`read_image`.
        reading: See :func:`read_image`.
        annotation_files: Dictionary from image folder to the annotation files that list its images;
            used in error messages.

    Raises:
        UnreadableImageError: If the image cannot be read.
        UserError: If the image's size differs from the size in the dataset dict.
    """
    path, image_name = dataset_dict["file_name"], _describe(dataset_dict, annotation_files)
    try:
        image = read_image(path, image_format, reading)
    except MemoryError:
        raise  # not caused by the file
    # Decoders raise exceptions of many types for damaged files.
    except Exception as error:
        reason = _reason(path, error)
        unreadable = UnreadableImageError(
            f"{image_name} cannot be read: {reason}. Expected {_expected(dataset_dict)}. Restore "
            "the file, or remove the image from the annotation file."
        )
        unreadable.reason = f"{path} cannot be read: {reason}"
        raise unreadable from error
    try:
        detection_utils.check_image_size(dataset_dict, image)
    except detection_utils.SizeMismatchError:
        height, width = image.shape[:2]
        raise UserError(
            f"{image_name} is {width}x{height} pixels (width x height); expected "
            f"{_expected(dataset_dict)}, as annotated. "
            f"{_size_advice(dataset_dict, (width, height), reading)}"
        ) from None
    return image


def _describe(dataset_dict: dict, annotation_files: Mapping[str, list[str]]) -> str:
    path, known = dataset_dict["file_name"], []
    if "image_id" in dataset_dict:
        known.append(f"id {dataset_dict['image_id']}")
    for folder, json_files in annotation_files.items():
        if path.startswith(os.path.join(folder, "")):
            known.append(f"listed in {' or '.join(json_files)}")
    return f"Image {path}" + (f" ({', '.join(known)})" if known else "")


def _rotated_box(annotation: dict) -> list[float]:
    box, mode = list(annotation["bbox"]), annotation["bbox_mode"]
    if mode != BoxMode.XYWHA_ABS:
        box = BoxMode.convert(BoxMode.convert(box, mode, BoxMode.XYWH_ABS), BoxMode.XYWH_ABS,
                              BoxMode.XYWHA_ABS)  # fmt: skip
    return [float(value) for value in box]


def read_labels(
    path: str, shape: tuple[int, int], labels: tuple[int, int] | None = None
) -> np.ndarray:
    """Read a label image for semantic segmentation.

    Args:
        path: Path of a single-channel image.
        shape: Expected height and width.
        labels: Number of classes, and the label of ignored pixels; None to accept any label.

    Returns:
        The class of each pixel, uint8 (H, W).

    Raises:
        UserError: If the file cannot be read, has a different size, or contains unknown labels.
    """
    try:
        with PathManager.open(path, "rb") as file:
            image: Image.Image = Image.open(file)
            # The labels in a palette image are its palette indices.
            found = np.asarray(image if image.mode == "P" else image.convert("L"))
    except Exception as error:  # decoders raise exceptions of many types for damaged files
        raise UserError(
            f"The label image {path} cannot be read: {_reason(path, error)}. Check that the file "
            "exists and is a valid image."
        ) from error
    if found.shape != tuple(shape):
        raise UserError(
            f"The label image {path} is {found.shape[1]}x{found.shape[0]} pixels (width x height); "
            f"expected {shape[1]}x{shape[0]}, the size of the labelled image. Correct the label "
            "image."
        )
    if labels is not None:
        count, ignored = labels
        wrong = sorted(set(np.unique(found).tolist()) - {*range(count), ignored})
        if wrong:
            raise UserError(
                f"The label image {path} contains the labels {wrong[:10]}; expected 0 to "
                f"{count - 1} for the {count} classes, or {ignored} for ignored pixels. Correct "
                "the label image."
            )
    return found


def read_image(path: str, image_format: str, reading: Reading = UPRIGHT) -> np.ndarray:
    """Read an entire image file, and convert it to 8 bits per channel.

    Args:
        path: Path of an image in one of the formats in `file_types.FORMATS`.
        image_format: "BGR", "RGB", "L", or any other format supported by Detectron2's `read_image`.
            Ignored if ``reading`` specifies a number of channels; the image can then be in any
            format supported by :func:`~senet_transfer.data.images.channels.decode_channels`.
        reading: Settings for reading the image. By default, the EXIF orientation is applied, as in
            Detectron2.

    Returns:
        The image (H, W, C), as returned by Detectron2's `read_image`: uint8 from 0 to 255, except
        for the format "YUV-BT.601".

    Raises:
        BrokenImageError: If the image has 32 bits per channel and ``reading`` specifies no value
            range.
        Exception: Any exception that Pillow raises for a missing, broken or truncated file.
    """
    with PathManager.open(path, "rb") as file:
        return decode_image(file.read(), image_format, reading)


def decode_image(data: bytes, image_format: str, reading: Reading = UPRIGHT) -> np.ndarray:
    """Decode an encoded image in the same way as :func:`read_image`."""
    with no_truncated_images():
        if reading.channels:
            return decode_channels(data, reading)
        image: Image.Image = Image.open(io.BytesIO(data), formats=allowed_formats())
        orientation = exif_orientation(image) if reading.upright else None
        pixels = decode_jpeg(data, image_format) if image.format == "JPEG" else None
        if pixels is None:
            image = to_8_bit(image, reading.value_range, data)
            image.load()
            pixels = detection_utils.convert_PIL_to_numpy(image, image_format)
        return turn_upright(pixels, orientation)


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "the file does not exist"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "it is empty (0 bytes)"
    if isinstance(error, Image.DecompressionBombError):
        said = str(error).rstrip(".")
        return f"{said}; if this size is intended, increase PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, UnidentifiedImageError):
        with PathManager.open(path, "rb") as file:
            head = file.read(20)
        return f"it begins with {head!r}, which does not match any supported image format"
    return str(error) or type(error).__name__


def _expected(dataset_dict: dict) -> str:
    if "width" in dataset_dict and "height" in dataset_dict:
        return f"an image of {dataset_dict['width']}x{dataset_dict['height']} pixels"
    return "an image"


def _size_advice(dataset_dict: dict, found: tuple[int, int], reading: Reading) -> str:
    """Return a suggested fix for an image whose size differs from its annotation."""
    if found[::-1] != (dataset_dict["width"], dataset_dict["height"]):
        return (
            "The boxes would not match this image. Annotate this file, or restore the file that "
            "was annotated."
        )
    orientation = None
    with suppress(Exception), PathManager.open(dataset_dict["file_name"], "rb") as file:
        orientation = exif_orientation(Image.open(file))
    if orientation in SIDEWAYS and reading.upright:
        return (
            f"The image is rotated according to its EXIF orientation, {orientation}, but was "
            "annotated without this rotation. If the boxes match the stored image, set INPUT.EXIF "
            "to ignore, or remove the EXIF tag. Otherwise, annotate the rotated image."
        )
    if orientation in SIDEWAYS:
        return (
            f"The EXIF orientation of the image, {orientation}, is not applied, but the image was "
            "annotated with this rotation. Set INPUT.EXIF to apply, or annotate the stored image."
        )
    return "Width and height are swapped in the annotation file. Correct the annotation file."
