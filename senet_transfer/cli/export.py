"""The export of models from the command line."""

import argparse
import os

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from torch import Tensor, nn

from senet_transfer.config import is_classification
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.model_from import model_config
from senet_transfer.errors import UserError
from senet_transfer.export import FORMATS, export_detector, export_network
from senet_transfer.models.classifier import Classifier
from senet_transfer.models.image_classifier import preprocessing_of


def export_model(args: argparse.Namespace) -> str:
    """Exports as a command line of ``tools/export.py`` says.

    Returns:
        What was compared, in words.

    Raises:
        UserError: the model can't be told or built, or what is asked for doesn't go together.
    """
    form = _form(args.output)
    cfg = model_config(args.model, args.config_file, args.weights, args.opts)
    model = _load(cfg)
    if is_classification(cfg) or args.trunk:
        return _export_network(args, form, cfg, model)
    if form != "torchscript":
        raise UserError(
            f"{args.output} is to be {form}, and a detector can be exported as TorchScript (.ts). "
            "Name it so, or take its trunk with --trunk."
        )
    if not args.image:
        raise UserError("A detector is traced on an image. Name one, best with objects: --image.")
    found = export_detector(model, args.output, _image(args.image, cfg))
    return f"Compared with the eager detector: the same {found} objects."


def _form(output: str) -> str:
    ending = os.path.splitext(output)[1]
    forms = {value: key for key, value in FORMATS.items()}
    if ending not in forms:
        raise UserError(
            f"{output} ends in {ending!r}, expected one of {', '.join(forms)}, which says what to "
            "write."
        )
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise UserError(f"There is no folder {os.path.dirname(output)}. Make it first.")
    return forms[ending]


def _load(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(cfg.MODEL.WEIGHTS)
    return model.eval()


def _export_network(args: argparse.Namespace, form: str, cfg: CfgNode, model: nn.Module) -> str:
    preprocessing = preprocessing_of(cfg)
    size = tuple(args.size or [preprocessing.crop])
    if len(size) > 2 or any(side < 1 for side in size):
        raise UserError(f"--size is {args.size}, expected a side, or height and width, in pixels.")
    network = model.backbone if args.trunk else _without_batches(model)
    worst = export_network(
        network,
        args.output,
        form=form,
        preprocessing=preprocessing,
        size=(size[0], size[-1]),
        classes=() if args.trunk else cfg.DATASETS.CLASSES,
    )
    return f"Compared with the eager network: outputs differ by {worst:.1e} of the largest."


def _without_batches(model: nn.Module) -> nn.Module:
    """The same classifier, of normalised images in place of a loader's batches."""
    plain = Classifier(model.backbone, num_classes=model.linear.out_features)
    plain.linear = model.linear
    return plain


def _image(path: str, cfg: CfgNode) -> Tensor:
    """As Detectron2's evaluation reads it."""
    try:
        image = detection_utils.read_image(path, cfg.INPUT.FORMAT)
    except OSError as error:
        raise UserError(f"{path} can't be read as an image: {error}. Name another.") from error
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    image = resize.get_transform(image).apply_image(image)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
