"""The export of any model by the name of the file to write."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor, nn

from senet_transfer.config import is_classification
from senet_transfer.errors import UserError
from senet_transfer.export.detectors import export_detector
from senet_transfer.export.formats import FORMATS, export_network
from senet_transfer.models.image_classifier import preprocessing_of


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
        model: an ``ImageClassifier`` or a Detectron2 detector, on the CPU, in evaluation mode.
        cfg: its config.
        output: the file to write; its suffix is one of :data:`FORMATS`.
        backbone_only: export the feature maps only.
        size: the side of the images in pixels, or their height and width; None for the test crop.
        image: an image to trace a detector with.

    Returns:
        A sentence on the comparison with the eager model.

    Raises:
        UserError: the arguments do not go together, or the file computes something else.
    """
    form = format_of(output)
    if is_classification(cfg) or backbone_only:
        preprocessing = preprocessing_of(cfg)
        size = tuple(size or [preprocessing.crop])
        if len(size) > 2 or any(side < 1 for side in size):
            raise UserError(
                f"--size is {list(size)}, expected a side, or height and width, in pixels."
            )
        worst = export_network(
            model.backbone if backbone_only else model,
            output,
            form=form,
            preprocessing=preprocessing,
            size=(size[0], size[-1]),
            classes=() if backbone_only else cfg.DATASETS.CLASSES,
        )
        return f"Compared with the eager network: outputs differ by {worst:.1e} of the largest."
    if form != "torchscript":
        raise UserError(
            f"{output} is to be {form}, and a detector can be exported as TorchScript (.ts). "
            "Name it so, or export only its backbone, with --backbone."
        )
    if not image:
        raise UserError("A detector is traced on an image. Name one, best with objects: --image.")
    found = export_detector(model, output, _read_image(image, cfg))
    return f"Compared with the eager detector: the same {found} objects."


def format_of(output: str) -> str:
    """Return the key of :data:`FORMATS` that the suffix of a file to write stands for.

    Raises:
        UserError: there is no such format, or no such folder.
    """
    suffix = os.path.splitext(output)[1]
    forms = {value: key for key, value in FORMATS.items()}
    if suffix not in forms:
        raise UserError(
            f"{output} ends in {suffix!r}, expected one of {', '.join(forms)}, which says what to "
            "write."
        )
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise UserError(f"There is no folder {os.path.dirname(output)}. Make it first.")
    return forms[suffix]


def _read_image(path: str, cfg: CfgNode) -> Tensor:
    """Read an image as Detectron2's evaluation does."""
    try:
        image = detection_utils.read_image(path, cfg.INPUT.FORMAT)
    except OSError as error:
        raise UserError(f"{path} can't be read as an image: {error}. Name another.") from error
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    image = resize.get_transform(image).apply_image(image)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
