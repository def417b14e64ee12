"""Detectors as TorchScript, by tracing, as Detectron2 supports it."""

import json
from pathlib import Path

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.export.deploy import deploy
from senet_transfer.export.formats import quiet

# Pixels, for boxes; shares, for scores.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3


def export_detector(model: nn.Module, path: str | Path, image: Tensor) -> int:
    """Writes a detector, norms folded, and compares what was written with it.

    The file takes one image, uint8 or float32 ``(3, H, W)`` of 0-255 and of any size, resized and
    with its channels in the order that the detector was trained with. It returns tensors, named in
    the file's extra file ``outputs``: boxes in pixels of that image, scores, classes and, of a
    Mask R-CNN, 28x28 masks, then the image's size.

    Args:
        model: a meta-architecture of Detectron2.
        path: the file to write.
        image: one to trace with; a part of it is compared on.

    Returns:
        The number of objects found in that part.

    Raises:
        UserError: the file finds something else than the detector.
    """
    model = model.eval().cpu()
    adapter = TracingAdapter(deploy(model), [{"image": image}], _infer)
    part = image[:, image.shape[1] // 8 :, image.shape[2] // 16 :].contiguous()
    with torch.no_grad(), quiet():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        expected = _infer(model, [{"image": part}])[0]
        names = [*expected.get_fields(), "image_size"]
        torch.jit.save(traced, str(path), _extra_files={"outputs": json.dumps(names)})
        found = adapter.outputs_schema(torch.jit.load(str(path))(part))[0]
    _compare(path, expected, found)
    return len(expected)


def _infer(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Instances]:
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)
    return [found["instances"] for found in model(inputs)]


def _compare(path: str | Path, expected: Instances, found: Instances) -> None:
    same = len(found) == len(expected)
    if same:
        boxes = (found.pred_boxes.tensor - expected.pred_boxes.tensor).abs()
        scores = (found.scores - expected.scores).abs()
        same = bool((boxes <= BOX_TOLERANCE).all() and (scores <= SCORE_TOLERANCE).all())
        same = same and torch.equal(found.pred_classes, expected.pred_classes)
    if not same:
        raise UserError(
            f"{path} finds other objects than the detector ({len(found)}, expected "
            f"{len(expected)}, on the part of the image that was compared). Objects with nearly "
            "equal scores may change places: try another image."
        )
