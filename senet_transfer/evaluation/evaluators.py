"""Selection of Detectron2 evaluators by a dataset's ``evaluator_type`` and the model's outputs."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager
from PIL import Image

from senet_transfer.config.architectures import (
    OBJECTS,
    PANOPTIC,
    PIXELS,
    PROPOSALS,
    predicts,
    predicts_rotated_boxes,
)
from senet_transfer.errors import UserError

# The types of predictions that each kind of evaluator uses.
_EVALUATED = {
    "coco": {OBJECTS, PROPOSALS},
    "rotated": {OBJECTS, PROPOSALS},
    "lvis": {OBJECTS, PROPOSALS},
    "pascal_voc": {OBJECTS},
    "sem_seg": {PIXELS},
    "panoptic": {PANOPTIC},
    "cityscapes_instance": {OBJECTS},
    "cityscapes_sem_seg": {PIXELS},
}

# Kinds of evaluators for each `evaluator_type`.
_KINDS = {
    "coco": ("coco",),
    "rotated_coco": ("rotated",),
    "lvis": ("lvis",),
    "pascal_voc": ("pascal_voc",),
    "sem_seg": ("sem_seg",),
    "coco_panoptic_seg": ("coco", "sem_seg", "panoptic"),
    "ade20k_panoptic_seg": ("coco", "sem_seg", "panoptic"),
    "cityscapes_instance": ("cityscapes_instance",),
    "cityscapes_sem_seg": ("cityscapes_sem_seg",),
}

# The package that each kind of evaluator imports, and the command to install this package.
_PACKAGES = {
    "lvis": ("lvis", "pip install --no-deps lvis"),
    "panoptic": (
        "panopticapi",
        "pip install git+https://github.com/cocodataset/panopticapi.git",
    ),
    "cityscapes_instance": ("cityscapesscripts", "pip install cityscapesscripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "pip install cityscapesscripts"),
}


def evaluator_kinds(cfg: CfgNode, name: str) -> list[str]:
    """Return the types of evaluators that support both a dataset and a model's predictions.

    Args:
        cfg: The model's config.
        name: The name of a registered dataset.

    Raises:
        UserError: If the dataset's ``evaluator_type`` is unknown, or if no evaluator for this type
            of dataset supports the model's predictions.
    """
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type", "coco")
    if kind not in _KINDS:
        raise UserError(
            f"The evaluator_type of the dataset {name} is {kind!r}; expected one of: "
            f"{', '.join(_KINDS)}. Register the dataset with one of these types, or remove the "
            "dataset from DATASETS.TEST."
        )
    kinds = list(_KINDS[kind])
    if kind == "coco" and predicts_rotated_boxes(cfg):
        kinds = ["rotated"]
    elif kind == "coco" and metadata.get("stuff_classes"):
        kinds = ["coco", "sem_seg"]
    predicted = predicts(cfg)
    found = [kind for kind in kinds if _EVALUATED[kind] & predicted]
    if not found:
        needed = sorted(set().union(*(_EVALUATED[kind] for kind in kinds)))
        raise UserError(
            f"The evaluator_type of the dataset {name} is {kind!r}, which evaluates "
            f"{' and '.join(needed)}, but MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE}, which predicts {' and '.join(sorted(predicted))}. "
            "Change DATASETS.TEST or MODEL.META_ARCHITECTURE."
        )
    return found


def check_evaluators(cfg: CfgNode, train: Sequence[str], test: Sequence[str]) -> None:
    """Check that a run's datasets can be read and its predictions can be evaluated.

    Args:
        cfg: The run's config.
        train: The names of the datasets to train on.
        test: The names of the datasets to evaluate.

    Raises:
        UserError: If there is no evaluator for a dataset, or if a package or metadata required for
            reading or evaluation is missing.
    """
    for name in train:
        # Detectron2 also requires this package to read the annotations.
        if MetadataCatalog.get(name).get("evaluator_type") == "lvis":
            _check_package("lvis", name)
    for name in test:
        kinds = evaluator_kinds(cfg, name)
        for kind in kinds:
            _check_package(kind, name)
        if "sem_seg" in kinds and MetadataCatalog.get(name).get("ignore_label") is None:
            raise UserError(
                f"The metadata of the dataset {name} contains no ignore_label, which is required "
                "to evaluate semantic segmentation. Set it in the code that registers the dataset: "
                f"MetadataCatalog.get({name!r}).set(ignore_label=255)."
            )


def _check_package(kind: str, name: str) -> None:
    package, command = _PACKAGES.get(kind, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"The dataset {name} requires the package {package}, which is not installed. Install "
            f"it with: {command}"
        )


def other_evaluator(kind: str, name: str, output_dir: str) -> DatasetEvaluator:
    """Build an evaluator of any type except "coco".

    Args:
        kind: An evaluator type, as returned by :func:`evaluator_kinds`.
        name: The name of the dataset.
        output_dir: The folder for the predictions.
    """
    if kind == "rotated":
        # The file may have been cached by an earlier run for different data.
        return RotatedCOCOEvaluator(name, output_dir=output_dir, allow_cached_coco=False)
    if kind == "sem_seg":
        return SemSegEvaluator(name, output_dir=output_dir, sem_seg_loading_fn=_read_labels)
    if kind == "panoptic":
        return COCOPanopticEvaluator(name, output_dir)
    if kind == "lvis":
        return CurrentLVISEvaluator(name, output_dir=output_dir)
    evaluators: dict[str, Any] = {
        "pascal_voc": PascalVOCDetectionEvaluator,
        "cityscapes_instance": CurrentCityscapesInstanceEvaluator,
        "cityscapes_sem_seg": CurrentCityscapesSemSegEvaluator,
    }
    return evaluators[kind](name)


class _CurrentNumpy(DatasetEvaluator):
    """Base class for evaluators that use functions or types that were removed from NumPy.

    lvis 0.5.3 uses ``numpy.float``, and cityscapesscripts 2.3.0 uses ``numpy.in1d``.
    """

    def evaluate(self) -> dict[str, Any] | None:
        """Compute the metrics. All processes must call this method together."""
        removed = {"float": float, "in1d": np.isin}
        missing = {name: value for name, value in removed.items() if not hasattr(np, name)}
        with _attributes(np, missing):
            return super().evaluate()


class CurrentLVISEvaluator(_CurrentNumpy, LVISEvaluator):
    """Detectron2's LVIS evaluator for current NumPy versions."""


class CurrentCityscapesSemSegEvaluator(_CurrentNumpy, CityscapesSemSegEvaluator):
    """Detectron2's Cityscapes semantic segmentation evaluator for current NumPy versions."""


class CurrentCityscapesInstanceEvaluator(_CurrentNumpy, CityscapesInstanceEvaluator):
    """Detectron2's Cityscapes instance segmentation evaluator for current NumPy versions.

    cityscapesscripts writes the matches to a JSON file in the working directory. With current NumPy
    versions, this fails because the matches contain NumPy integers. This class does not write the
    file.
    """

    def evaluate(self) -> dict[str, Any] | None:
        """Compute the metrics. All processes must call this method together."""
        name = "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"
        with _attributes(importlib.import_module(name), {"writeDict2JSON": lambda *_: None}):
            return super().evaluate()


@contextlib.contextmanager
def _attributes(module: ModuleType, attributes: dict[str, Any]) -> Iterator[None]:
    """Set attributes of a module inside the context, and restore them on exit."""
    before = {name: getattr(module, name) for name in attributes if hasattr(module, name)}
    for name, value in attributes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name in attributes:
            delattr(module, name)
        for name, value in before.items():
            setattr(module, name, value)


def _read_labels(path: str, dtype: Any = None) -> np.ndarray:
    # Detectron2's function passes copy=False, which NumPy 2 rejects.
    with PathManager.open(path, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)
