"""Export of detectors to ONNX with Detectron2's tracing support."""

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from detectron2.export import TracingAdapter
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.export.deploy import deploy
from senet_transfer.export.detectors import BOX_TOLERANCE, SCORE_TOLERANCE, crop, infer
from senet_transfer.export.formats import quiet, written_if_valid
from senet_transfer.export.onnx_file import open_session, require_onnx, write_onnx
from senet_transfer.preprocessing import normalise

if TYPE_CHECKING:
    from onnx import ModelProto

# Names of the score threshold's attribute in Detectron2's RetinaNet and box predictors.
_THRESHOLD = "test_score_thresh"

Arrays = dict[str, np.ndarray]


@dataclass
class Comparison:
    """Comparison of the objects detected by an exported detector and by the eager detector.

    Attributes:
        threshold: The minimum score of the compared objects.
        objects: The total number of objects detected in an image and in a crop of the image.
        box: The largest difference between box coordinates, in pixels.
        score: The largest difference between scores or between mask probabilities.
    """

    threshold: float
    objects: int = 0
    box: float = 0.0
    score: float = 0.0

    def __str__(self) -> str:
        return (
            f"both detect the same {self.objects} objects with scores above {self.threshold:g}. "
            f"The largest differences are {self.box:.1e} pixels and {self.score:.1e} in scores."
        )


def export_detector_to_onnx(
    model: nn.Module,
    path: str | Path,
    image: Tensor,
    *,
    format: str,
    metadata: Mapping[str, object],
) -> Comparison:
    """Export a detector with folded batch norms to ONNX, and check the exported file.

    The exported model takes one RGB image of any size, float32 ``(3, H, W)``, with values from 0 to
    255. The caller must resize the image as in evaluation. The channel order and the normalisation
    are part of the model. The outputs are sorted by score: ``boxes`` (N, 4) as x1, y1, x2, y2 in
    input pixels, ``scores`` (N,) and ``classes`` (N,) as indices. A Mask R-CNN also has the output
    ``masks`` (N, 28, 28), the mask probabilities inside each box.

    The exported detector is compared with the original one on ``image`` and on a crop of it. If the
    original detects no objects, the comparison ignores the score threshold. On a uniformly grey
    image, the exported detector must detect no objects if the original detects none.

    Args:
        model: A Detectron2 meta-architecture that predicts objects with boxes.
        path: The file to write.
        image: An RGB image ``(3, H, W)`` with values from 0 to 255, for tracing and comparison.
        format: The channel order that the detector expects, "RGB", "BGR" or "L".
        metadata: Values to write to the file's metadata as JSON.

    Returns:
        The number of compared objects, and the largest differences in boxes and scores.

    Raises:
        UserError: If a required package is missing, or if the exported detector and the original
            one detect different objects.
    """
    require_onnx()
    # The caller's model stays on its device and in its mode.
    model = copy.deepcopy(model).cpu().eval()
    # The noise prevents equal scores in regions of uniform colour. The order of equal scores would
    # depend on rounding.
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    image = (image + 16 * (noise - 0.5)).clamp(0, 255)
    views = [image, crop(image)]
    threshold, limit = _score_limits(model)
    values = {**metadata, "score_threshold": threshold}
    texts = {key: json.dumps(value) for key, value in values.items()}
    with written_if_valid(path) as partial, torch.no_grad(), quiet():
        exported = _trace(deploy(model), image, format)
        detected = any(len(_arrays(model, view, format)["scores"]) for view in views)
        compared = Comparison(threshold if detected else 0.0)
        _set_thresholds(model, exported, compared.threshold)
        write_onnx(exported, partial, texts)
        run = _runner(partial)
        for view in views:
            _compare(path, _arrays(model, view, format), run(view), limit, compared)
        if not detected:
            _set_thresholds(model, exported, threshold)
            write_onnx(exported, partial, texts)
            run = _runner(partial)
        grey = torch.full_like(crop(views[1]), 128)
        expected, found = len(_arrays(model, grey, format)["scores"]), len(run(grey)["scores"])
        if not compared.objects:
            raise UserError(
                f"{path} could not be checked, because the model detects nothing in the image, "
                "even without a score threshold. Use a different --image."
            )
        if found and not expected:
            raise UserError(
                f"The exported detector {path} detects {found} objects in a uniformly grey image, "
                "in which the original model detects none. Export the model to TorchScript (.ts) "
                "instead."
            )
    return compared


def _arrays(model: nn.Module, image: Tensor, format: str) -> Arrays:
    return {name: found.numpy() for name, found in _detect(model, image, format)}


def _detect(model: nn.Module, image: Tensor, format: str) -> Iterator[tuple[str, Tensor]]:
    """Return the boxes, scores, classes and masks for an RGB image ``(3, H, W)``."""
    (ordered,) = normalise(image[None], torch.zeros(()), torch.ones(()), format)
    (found,) = infer(model, [{"image": ordered}])
    yield "boxes", found.pred_boxes.tensor
    yield "scores", found.scores
    yield "classes", found.pred_classes
    if found.has("pred_masks"):
        yield "masks", found.pred_masks[:, 0]


def _trace(model: nn.Module, image: Tensor, format: str) -> "ModelProto":
    import onnx

    for module in _thresholded(model):
        # A buffer becomes an ONNX initializer, so its value can be changed in the exported model.
        threshold = torch.tensor(float(getattr(module, _THRESHOLD)))
        delattr(module, _THRESHOLD)
        module.register_buffer(_THRESHOLD, threshold)
    names, examples = zip(*_detect(model, image, format), strict=True)
    adapter = TracingAdapter(
        model, image, lambda model, image: tuple(out for _, out in _detect(model, image, format))
    )
    written = io.BytesIO()
    torch.onnx.export(
        adapter,
        (image,),
        written,
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=list(names),
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "objects"} for name in names},
        },
    )
    exported = onnx.load_from_string(written.getvalue())
    for output, example in zip(exported.graph.output, examples, strict=True):
        shape = output.type.tensor_type.shape
        for dim, size in zip(shape.dim[1:], example.shape[1:], strict=True):
            dim.dim_value = size
    return exported


def _thresholded(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, _THRESHOLD)]


def _score_limits(model: nn.Module) -> tuple[float, int]:
    """Return a detector's score threshold and its maximum number of detections per image."""
    module = _thresholded(model)[0]
    limit = "test_topk_per_image" if hasattr(module, "test_topk_per_image") else None
    return float(getattr(module, _THRESHOLD)), int(
        getattr(module, limit or "max_detections_per_image")
    )


def _set_thresholds(model: nn.Module, exported: "ModelProto", threshold: float) -> None:
    from onnx import numpy_helper

    for module in _thresholded(model):
        setattr(module, _THRESHOLD, threshold)
    for tensor in exported.graph.initializer:
        if tensor.name.endswith(_THRESHOLD):
            value = np.array(threshold, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _runner(path: str | Path) -> Callable[[Tensor], Arrays]:
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))


def _compare(
    path: str | Path, expected: Arrays, found: Arrays, limit: int, compared: Comparison
) -> None:
    """Check that two detectors return the same objects, and add the results to ``compared``.

    The order of the objects may differ. If a detector returns the maximum number of detections per
    image (``limit``), those with the lowest scores may be missing from the other detector's results
    because of rounding errors.

    Raises:
        UserError: If the objects differ.
    """
    boxes = np.abs(expected["boxes"][:, None] - found["boxes"][None]).max(2, initial=0)
    scores = np.abs(expected["scores"][:, None] - found["scores"][None])
    same = (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
    same &= expected["classes"][:, None] == found["classes"][None]
    if "masks" in expected:
        masks = np.abs(expected["masks"][:, None] - found["masks"][None]).max((2, 3), initial=0)
        same &= masks <= SCORE_TOLERANCE
        scores = np.maximum(scores, masks)
    for objects, matched in ((expected, same.any(1)), (found, same.any(0))):
        least = min(objects["scores"]) if len(matched) >= limit else compared.threshold
        if (~matched & (objects["scores"] > least + SCORE_TOLERANCE)).any():
            raise UserError(
                f"The exported detector {path} detects {len(found['scores'])} objects in an image. "
                f"They differ from the {len(expected['scores'])} objects detected by the model, "
                "possibly because rounding determines which of two overlapping boxes is suppressed "
                "by NMS. Try a different --image."
            )
    compared.objects += int(same.any(1).sum())
    compared.box = max(compared.box, float(boxes[same].max(initial=0)))
    compared.score = max(compared.score, float(scores[same].max(initial=0)))
