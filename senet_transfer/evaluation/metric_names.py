"""Validation of the metric names in a config."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from senet_transfer.config import is_classification
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

_AREAS = ("APs", "APm", "APl")
_DETECTION = {
    "bbox": ("AP", "AP50", "AP75", *_AREAS),
    "segm": ("AP", "AP50", "AP75", *_AREAS),
    "keypoints": ("AP", "AP50", "AP75", *_AREAS[1:]),
}
_CLASSIFICATION = ("top1_error", "top5_error", "images")


def check_metric(cfg: CfgNode, key: str, metric: str) -> None:
    """Check that the evaluation of a run can return the given metric.

    Args:
        cfg: The config of the run.
        key: The config key with the metric's name, for error messages.
        metric: The metric's name. If empty, nothing is checked.

    Raises:
        UserError: If no evaluation of the run can return the metric.
    """
    tests = list(cfg.DATASETS.TEST)
    if not metric or not tests:
        return
    # With several datasets, Detectron2 adds the dataset names to the metric names.
    prefixes = [f"{name}/" for name in tests] if len(tests) > 1 else [""]
    prefix = next((prefix for prefix in prefixes if metric.startswith(prefix)), None)
    known = _known(cfg)
    if prefix is not None and _exists(cfg, metric.removeprefix(prefix), known):
        return
    why = "which the evaluation doesn't return"
    if prefix is None:
        why = f"but with {len(tests)} datasets in DATASETS.TEST, metric names start with "
        why += "a dataset name"
    examples = [f"{prefix}{name}" for prefix in prefixes for name in known[:4]]
    raise UserError(
        f"{key} is {metric!r}, {why}. Set it to a metric such as: {first_of(examples, 8)}."
    )


def _known(cfg: CfgNode) -> list[str]:
    if is_classification(cfg):
        names = [f"classification/{name}" for name in _CLASSIFICATION]
        return [*names, "validation/total_loss"] if cfg.TEST.LOSS else names
    tasks = ["bbox", *["segm"] * cfg.MODEL.MASK_ON, *["keypoints"] * cfg.MODEL.KEYPOINT_ON]
    names = [f"{task}/{name}" for task in tasks for name in _DETECTION[task]]
    if len(cfg.DATASETS.CLASSES) > 1:
        names += [f"{task}/AP-{name}" for task in tasks for name in cfg.DATASETS.CLASSES]
    return names


def _exists(cfg: CfgNode, name: str, known: list[str]) -> bool:
    """Return True if a metric is known, or if a dataset's evaluator may return unlisted metrics."""
    task = name.partition("/")[0]
    if task == "validation":
        return cfg.TEST.LOSS and (name in known or not is_classification(cfg))
    if name in known or is_classification(cfg):
        return name in known
    kinds = {MetadataCatalog.get(test).get("evaluator_type", "coco") for test in cfg.DATASETS.TEST}
    others = task not in (*_DETECTION, "classification") or kinds != {"coco"}
    return others and "/" in name
