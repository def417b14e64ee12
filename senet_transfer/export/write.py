"""Export of any model in the format selected by the file name."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor, nn

from senet_transfer.config import is_classification
from senet_transfer.config.architectures import PIXELS, predicts
from senet_transfer.data.detection.fast_images import ChannelResizeShortestEdge
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.decode import BrokenImageError
from senet_transfer.errors import UserError
from senet_transfer.export.detectors import export_detector
from senet_transfer.export.formats import FORMATS, export_network
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
) -> str:
    """Export a classifier, a detector, or the backbone of either.

    Args:
        model: An ``ImageClassifier`` or a Detectron2 detector, on the CPU, in evaluation mode.
        cfg: The model's config.
        output: The file to write. Its suffix must be one of :data:`FORMATS`.
        backbone_only: If True, export only the backbone, which returns feature maps.
        size: The side length of square images, or the height and width, in pixels. If None, the
            test crop size is used.
        image: The path of an image for tracing a detector.

    Returns:
        A sentence with the result of the comparison with the eager model.

    Raises:
        UserError: If the arguments are inconsistent, or if the exported file's outputs differ from
            the model's outputs.
    """
    form = format_of(output)
    if is_classification(cfg) or backbone_only:
        preprocessing = preprocessing_of(cfg)
        size = tuple(size or [preprocessing.crop])
        if len(size) > 2 or any(side < 1 for side in size):
            raise UserError(
                f"--size is {list(size)}; expected one side length, or height and width, in pixels."
            )
        worst = export_network(
            model.backbone if backbone_only else model,
            output,
            form=form,
            preprocessing=preprocessing,
            size=(size[0], size[-1]),
            classes=() if backbone_only else cfg.DATASETS.CLASSES,
            mode=cfg.INPUT.CLASSIFICATION.TEST_MODE if is_classification(cfg) else "short_side",
        )
        return f"Compared with the eager network: the largest relative difference is {worst:.1e}."
    if form != "torchscript":
        raise UserError(
            f"{output} selects the format {form}, but detectors can only be exported to "
            "TorchScript. Choose a name that ends in .ts, or export only the backbone with "
            "--backbone."
        )
    if PIXELS in predicts(cfg):
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, and the export of "
            "segmentation models is not supported. Export only the backbone with --backbone."
        )
    if not image:
        raise UserError(
            "A detector is exported by tracing, which requires an image. Use --image to specify an "
            "image that shows objects."
        )
    found = export_detector(model, output, _read_image(image, cfg))
    return f"Compared with the eager detector: both detect the same {found} objects."


def format_of(output: str) -> str:
    """Return the key of :data:`FORMATS` selected by the suffix of an output file.

    Raises:
        UserError: If the suffix is unknown, or if the file's folder does not exist.
    """
    suffix = os.path.splitext(output)[1]
    forms = {value: key for key, value in FORMATS.items()}
    if suffix not in forms:
        raise UserError(
            f"{output} ends in {suffix!r}, which is not the suffix of an export format. Expected "
            f"one of: {', '.join(forms)}."
        )
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise UserError(f"The folder {os.path.dirname(output)} does not exist. Create it first.")
    return forms[suffix]


def _read_image(path: str, cfg: CfgNode) -> Tensor:
    """Read and resize an image in the same way as Detectron2's evaluation."""
    try:
        image = read_image(path, cfg.INPUT.FORMAT, cfg.INPUT.VALUE_RANGE)
    except (OSError, BrokenImageError) as error:
        raise UserError(
            f"{path} can't be read as an image: {error}. Choose a different image."
        ) from error
    kind = ChannelResizeShortestEdge if channels_of(cfg.INPUT.FORMAT) else ResizeShortestEdge
    resize = kind(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    image = resize.get_transform(image).apply_image(image)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
