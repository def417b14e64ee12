"""Export of detectors to TorchScript with Detectron2's tracing support."""

import copy
import json
from pathlib import Path

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.structures import Instances
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.export.deploy import deploy
from senet_transfer.export.formats import quiet, written_if_valid

# Maximum allowed differences in boxes (in pixels) and scores (in [0, 1]).
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3


def export_detector(model: nn.Module, path: str | Path, image: Tensor) -> int:
    """Export a detector with folded batch norms to TorchScript, and check the exported file.

    The exported module takes one image of any size, uint8 or float32 ``(3, H, W)``, with values
    from 0 to 255. The caller must resize the image and order its channels as in training. The
    outputs are tensors: boxes in pixels, scores, classes, 28x28 masks (Mask R-CNN only), and the
    image size. A region proposal network outputs proposal boxes, objectness logits, and the image
    size. The extra file ``outputs`` in the TorchScript archive lists the names of the outputs.

    Args:
        model: A Detectron2 meta-architecture.
        path: The file to write.
        image: The image for tracing. A crop of it is used for the comparison.

    Returns:
        The number of objects detected in the crop.

    Raises:
        UserError: If the exported module and the original detector detect different objects.
    """
    # The caller's model stays on its device and in its mode.
    model = copy.deepcopy(model).cpu().eval()
    adapter = TracingAdapter(deploy(model), [{"image": image}], infer)
    part = crop(image)
    with written_if_valid(path) as partial, torch.no_grad(), quiet():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        expected = infer(model, [{"image": part}])[0]
        names = [*expected.get_fields(), "image_size"]
        torch.jit.save(traced, str(partial), _extra_files={"outputs": json.dumps(names)})
        found = adapter.outputs_schema(torch.jit.load(str(partial))(part))[0]
        _compare(path, expected, found)
    return len(expected)


def crop(image: Tensor) -> Tensor:
    """Crop an image ``(C, H, W)`` to a different aspect ratio."""
    return image[:, image.shape[1] // 8 :, image.shape[2] // 16 :].contiguous()


def infer(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Instances]:
    """Run inference, and return the results in pixel coordinates of the (resized) input images."""
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)
    key = "proposals" if isinstance(model, ProposalNetwork) else "instances"
    return [found[key] for found in model(inputs)]


def _compare(path: str | Path, expected: Instances, found: Instances) -> None:
    same = len(found) == len(expected)
    if same and expected.has("proposal_boxes"):
        boxes = (found.proposal_boxes.tensor - expected.proposal_boxes.tensor).abs()
        scores = (found.objectness_logits.sigmoid() - expected.objectness_logits.sigmoid()).abs()
        same = bool((boxes <= BOX_TOLERANCE).all() and (scores <= SCORE_TOLERANCE).all())
    elif same:
        boxes = (found.pred_boxes.tensor - expected.pred_boxes.tensor).abs()
        scores = (found.scores - expected.scores).abs()
        same = bool((boxes <= BOX_TOLERANCE).all() and (scores <= SCORE_TOLERANCE).all())
        same = same and torch.equal(found.pred_classes, expected.pred_classes)
    if not same:
        raise UserError(
            f"The exported detector {path} detects {len(found)} objects in a crop of the image. "
            f"They differ from the {len(expected)} objects detected by the model, possibly because "
            "objects with nearly equal scores are sorted differently. Try a different image."
        )
