"""Export of any model to the format selected by the output file's suffix."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor, nn

from senet_transfer.config import is_classification
from senet_transfer.config.architectures import OBJECTS, PIXELS, predicts, predicts_rotated_boxes
from senet_transfer.data.build import eval_transform
from senet_transfer.data.detection.fast_images import ChannelResizeShortestEdge
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.decode import BrokenImageError
from senet_transfer.data.reading import reading_of
from senet_transfer.errors import UserError
from senet_transfer.export.detectors import export_detector
from senet_transfer.export.formats import FORMATS, export_network, written_if_valid
from senet_transfer.export.onnx_detectors import export_detector_to_onnx
from senet_transfer.models.image_classifier import preprocessing_of
from senet_transfer.preprocessing import channels_of


def export_model(
    model: nn.Module,
    cfg: CfgNode,
    output: str,
    *,
    backbone_only: bool = False,
    size: Sequence[int] | None = None,
    image: str = "",
    precision: str = "float32",
    calibration: str = "",
    compiled: bool = False,
) -> str:
    """Export a classifier, a detector, or the backbone of either.

    Args:
        model: An ``ImageClassifier`` or a Detectron2 detector, on the CPU, in evaluation mode.
        cfg: The model's config.
        output: The path of the file to write. Its suffix must be a value of :data:`FORMATS`.
        backbone_only: If True, export only the backbone, which returns feature maps.
        size: The side length of square images, or the height and width, in pixels. If None, the
            test crop size is used.
        image: The path of an image for tracing a detector and checking the exported file. Required
            for exporting a detector to TorchScript.
        precision: "float32" or, for classifiers and backbones in ONNX files, "float16" or "int8".
        calibration: A folder of images for int8 calibration and for comparing the float16 or int8
            network with the float32 network.
        compiled: If True, compile a ``.pt2`` file with AOTInductor for this machine's processor.

    Returns:
        Sentences that describe how the outputs compare with those of the eager model.

    Raises:
        UserError: If the arguments are inconsistent, or if the exported file's outputs differ from
            the model's outputs.
    """
    form = format_of(output, compiled=compiled)
    network = is_classification(cfg) or backbone_only
    if precision != "float32" and not (network and form == "onnx" and calibration):
        raise UserError(
            f"--precision is {precision}, the architecture is {cfg.MODEL.META_ARCHITECTURE}, the "
            f"output file is {output}, and --calibration is {calibration!r}. float16 and int8 are "
            "only available for classifiers and backbones in ONNX files (.onnx), and require a "
            "folder of images (--calibration). Change these options, or omit --precision."
        )
    if network:
        preprocessing = preprocessing_of(cfg)
        size = tuple(size or [preprocessing.crop])
        if len(size) > 2 or any(side < 1 for side in size):
            raise UserError(
                f"--size is {list(size)}; expected one side length, or height and width, in pixels."
            )
        with written_if_valid(output) as partial:
            worst = export_network(
                model.backbone if backbone_only else model,
                partial,
                form=form,
                preprocessing=preprocessing,
                size=(size[0], size[-1]),
                classes=() if backbone_only else cfg.DATASETS.CLASSES,
                mode=cfg.INPUT.CLASSIFICATION.TEST_MODE if is_classification(cfg) else "short_side",
                reading=reading_of(cfg),
            )
            said = (
                f"Compared with the eager network: the largest relative difference is {worst:.1e}."
            )
            if precision != "float32":
                converted = _convert(cfg, str(partial), precision, calibration, size, backbone_only)
                said = f"{said}\n{converted}"
        return said
    if form in ("torch_export", "aot_inductor"):
        raise UserError(
            f"The suffix of {output} selects the format {form}, but detectors can only be exported "
            "to ONNX and TorchScript. Choose a name that ends in .onnx or .ts, or export only the "
            "backbone with --backbone."
        )
    if PIXELS in predicts(cfg):
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, and the export of "
            "segmentation models is not supported. Export only the backbone with --backbone."
        )
    if form == "onnx":
        return _export_to_onnx(model, cfg, output, image)
    if not image:
        raise UserError(
            "Detectors are exported by tracing, which requires an image. Use --image to specify an "
            "image that shows objects."
        )
    found = export_detector(model, output, _read_image(image, cfg, cfg.INPUT.FORMAT))
    return f"Compared with the eager detector: both detect the same {found} objects."


def _convert(
    cfg: CfgNode,
    output: str,
    precision: str,
    calibration: str,
    size: Sequence[int],
    backbone_only: bool,
) -> str:
    # ONNX export requires the packages of the extra `export`.
    from senet_transfer.export.precision import CalibrationImages, convert_precision

    if size[0] != size[-1]:
        raise UserError(
            f"--size is {list(size)}; expected a single side length, because --precision "
            f"{precision} runs the network on square crops of the images in --calibration."
        )
    usual = eval_transform(cfg)
    transform = replace(
        usual,
        mode=usual.mode if is_classification(cfg) else "short_side",
        resize=max(usual.resize, size[0]),
        crop=size[0],
    )
    classes = () if backbone_only else cfg.DATASETS.CLASSES
    images = CalibrationImages(calibration, transform, classes)
    return convert_precision(output, precision, images)


def _export_to_onnx(model: nn.Module, cfg: CfgNode, output: str, image: str) -> str:
    unsupported = None
    if predicts(cfg) != {OBJECTS}:
        unsupported = "only proposals"
    elif predicts_rotated_boxes(cfg):
        unsupported = "rotated boxes"
    elif cfg.MODEL.KEYPOINT_ON:
        unsupported = "keypoints"
    if unsupported:
        raise UserError(
            f"The model predicts {unsupported}, but only detectors of objects with axis-aligned "
            "boxes, with or without masks, can be exported to ONNX. To export the model to "
            "TorchScript instead, choose a file name that ends in .ts. To export only the "
            "backbone, pass --backbone."
        )
    if cfg.INPUT.FORMAT not in ("RGB", "BGR", "L"):
        raise UserError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; expected RGB, BGR or L for export to ONNX. "
            "To export the model to TorchScript instead, choose a file name that ends in .ts."
        )
    metadata = {
        "task": "detection",
        "classes": list(cfg.DATASETS.CLASSES),
        "category_ids": list(cfg.DATASETS.CATEGORY_IDS),
        "format": cfg.INPUT.FORMAT,
        "mean": list(cfg.MODEL.PIXEL_MEAN),
        "std": list(cfg.MODEL.PIXEL_STD),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "value_range": list(cfg.INPUT.VALUE_RANGE),
        "upright": reading_of(cfg).upright,
    }
    pixels = _read_image(image, cfg, "RGB") if image else _example(cfg)
    compared = export_detector_to_onnx(
        model, output, pixels, format=cfg.INPUT.FORMAT, metadata=metadata
    )
    return f"Compared with the eager detector in ONNX Runtime: {compared}"


def _example(cfg: CfgNode) -> Tensor:
    """Return an example image with smooth random colours, for tracing a detector."""
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(1, 3, 6, 8, generator=generator)
    short = cfg.INPUT.MIN_SIZE_TEST or 800
    (image,) = F.interpolate(coarse, (short, short * 4 // 3), mode="bilinear")
    return image


def format_of(output: str, *, compiled: bool = False) -> str:
    """Return the export format (a key of :data:`FORMATS`) for the suffix of an output file.

    Args:
        output: The path of the output file.
        compiled: Whether the file is compiled with AOTInductor.

    Raises:
        UserError: If the suffix is unknown, or if the folder of the output file does not exist.
    """
    suffix = os.path.splitext(output)[1]
    forms = [name for name, value in FORMATS.items() if value == suffix]
    if not forms:
        raise UserError(
            f"{output} ends in {suffix!r}, which is not the suffix of an export format; expected "
            f"one of: {', '.join(dict.fromkeys(FORMATS.values()))}."
        )
    if compiled and "aot_inductor" not in forms:
        raise UserError(
            f"{output} ends in {suffix!r}, but only .pt2 files can be compiled. Choose a name that "
            "ends in .pt2, or omit --compile."
        )
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise UserError(f"The folder {os.path.dirname(output)} does not exist. Create it first.")
    return "aot_inductor" if compiled else forms[0]


def _read_image(path: str, cfg: CfgNode, format: str) -> Tensor:
    """Read an image, and resize it as Detectron2 does in evaluation."""
    try:
        image = read_image(path, format, reading_of(cfg))
    except (OSError, BrokenImageError) as error:
        raise UserError(
            f"{path} can't be read as an image: {error}. Choose a different image."
        ) from error
    kind = ChannelResizeShortestEdge if channels_of(cfg.INPUT.FORMAT) else ResizeShortestEdge
    resize = kind(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    image = resize.get_transform(image).apply_image(image)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
