"""Predictors for files written by ``senet export``."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from senet_transfer.data.images.decode import Reading
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.predictor.predictions import Classes
from senet_transfer.engine.predictor.predictor import ClassifierPredictor, DetectorPredictor, Resize
from senet_transfer.errors import UserError
from senet_transfer.preprocessing import channels_of
from senet_transfer.utils.private_api import open_compiled

SUFFIXES = (".onnx", ".pt2", ".ts")
_KEYS = ("preprocessing", "classes", "mode", "value_range", "upright", "task", "size")


def load_exported(
    path: str, *, threshold: float, top: int, **options: Any
) -> ClassifierPredictor | DetectorPredictor:
    """Return a predictor for an exported file; see :func:`senet_transfer.load`.

    Args:
        path: The exported file. Load only trusted files: formats other than ONNX can execute
            arbitrary code.
        threshold: The minimum score of objects.
        top: The number of most probable classes to include in a classifier's results.
        options: Further arguments for the predictor.

    Raises:
        UserError: If the file can't be read, or was not exported by this project.
    """
    opens = {".onnx": _open_onnx, ".pt2": _open_program, ".ts": _open_traced}
    try:
        run, metadata, size = opens[Path(path).suffix](path)
        found = {key: json.loads(text) for key, text in metadata.items() if text}
    except ImportError:
        raise
    except Exception as error:  # each library raises exceptions of many types
        raise UserError(
            f"{path} can't be read as an exported model: {type(error).__name__}: {error}. Export "
            "it again with senet export."
        ) from error
    if found.get("task") == "detection":
        return _detector(run, found, threshold=threshold, **options)
    if found.get("task", "classification") != "classification" or "preprocessing" not in found:
        raise UserError(
            f"{path} contains no description of its preprocessing, so it can't be used for "
            "prediction. Expected a classifier, or a detector in ONNX format, written by senet "
            "export."
        )
    return _classifier(run, found, size, top=top, **options)


Outputs = list[Tensor]


def _open_onnx(path: str) -> tuple[Callable[[Tensor], Outputs], Mapping[str, str], list]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(images: Tensor) -> Outputs:
        return [torch.from_numpy(out) for out in session.run(None, {given.name: images.numpy()})]

    texts = dict(session.get_modelmeta().custom_metadata_map)
    texts["outputs"] = json.dumps([output.name for output in session.get_outputs()])
    return run, texts, given.shape[-2:]


def _open_program(path: str) -> tuple[Callable[[Tensor], Outputs], Mapping[str, str], list]:
    with zipfile.ZipFile(path) as archive:
        compiled = any("aotinductor" in name for name in archive.namelist())
    if compiled:
        model, stored = open_compiled(path)
        return model, {key: stored.get(key, "") for key in _KEYS}, json.loads(stored["size"])
    texts = dict.fromkeys(_KEYS, "")
    program = torch.export.load(path, extra_files=texts)
    (example,), _ = program.example_inputs
    return program.module(), texts, list(example.shape[-2:])


def _open_traced(path: str) -> tuple[Callable[[Tensor], Outputs], Mapping[str, str], list]:
    texts = dict.fromkeys(_KEYS, "")
    return torch.jit.load(path, "cpu", _extra_files=texts), texts, []


def _classifier(
    run: Callable[[Tensor], Outputs], found: dict[str, Any], size: list, **options: Any
) -> ClassifierPredictor:
    preprocessing = found["preprocessing"]
    height, width = size or found.get("size") or [preprocessing["crop"]] * 2
    if height != width:
        raise UserError(
            f"The model takes images of {height}x{width} pixels; expected a square size. Export "
            "the model with a single side length."
        )
    transform = EvalTransform(
        mode=found.get("mode", "short_side"),
        resize=max(preprocessing["resize"], height),
        crop=height,
        interpolation=preprocessing["interpolation"],
        reading=Reading(
            tuple(found.get("value_range", ())),
            found.get("upright", False),
            channels_of(preprocessing["format"]),
        ),
    )

    def logits(batch: dict[str, Tensor]) -> Tensor:
        images = batch["image"].float()
        if images.dim() == 4:
            return run(images)[0]
        return run(images.flatten(0, 1))[0].unflatten(0, images.shape[:2]).mean(1)

    names = found["classes"]
    if not names:
        example = torch.zeros(1, transform.reading.channels or 3, height, width)
        names = [f"class {index}" for index in range(run(example)[0].shape[1])]
    return ClassifierPredictor(logits, transform, Classes(tuple(names)), **options)


def _detector(
    run: Callable[[Tensor], Outputs], found: dict[str, Any], **options: Any
) -> DetectorPredictor:
    def detect(inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": _instances(run, found["outputs"], given)} for given in inputs]

    side = found["min_size"]
    return DetectorPredictor(
        detect,
        Resize([side, side], found["max_size"]),
        Classes(tuple(found["classes"]), ids=tuple(found["category_ids"])),
        # The exported model takes RGB images and reorders the channels itself.
        input_format="L" if found["format"] == "L" else "RGB",
        reading=Reading(tuple(found["value_range"]), found.get("upright", True)),
        **options,
    )


def _instances(
    run: Callable[[Tensor], Outputs], names: list[str], given: dict[str, Any]
) -> Instances:
    image = given["image"].float().expand(3, -1, -1).contiguous()
    found = dict(zip(names, run(image), strict=True))
    instances = Instances(
        (image.shape[1], image.shape[2]),
        pred_boxes=Boxes(found["boxes"]),
        scores=found["scores"],
        pred_classes=found["classes"],
    )
    if "masks" in found:
        instances.pred_masks = found["masks"][:, None]
    return detector_postprocess(instances, given["height"], given["width"])
