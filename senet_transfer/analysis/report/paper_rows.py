"""Lookup of the SENet paper's results for a run's network and dataset."""

from dataclasses import dataclass

from detectron2.config import CfgNode

from senet_transfer.evaluation.paper_results import (
    PLACES365,
    Published,
    published_on_cifar,
    published_on_imagenet,
)
from senet_transfer.models.build import backbone_name

_TABLE_VII = "Squeeze-and-Excitation Networks, Table VII"
_PLACES365_IMAGES, _IMAGENET_IMAGES = 36_500, 50_000


@dataclass(frozen=True)
class PaperRow:
    """Published results of one network on one dataset.

    Attributes:
        name: Network name.
        values: Values in percent, by Detectron2 metric name.
        source: Publication and table.
        note: Reason why the results are not fully comparable with those of the run. Empty if the
            results are comparable.
    """

    name: str
    values: dict[str, float]
    source: str
    note: str = ""


# Faster R-CNN with FPN on COCO minival: AP, and AP at an IoU of 0.5.
COCO = {
    "resnet50": PaperRow("ResNet-50", {"AP": 38.0, "AP50": 57.9}, _TABLE_VII),
    "se_resnet50": PaperRow("SE-ResNet-50", {"AP": 40.4, "AP50": 61.0}, _TABLE_VII),
    "resnet101": PaperRow("ResNet-101", {"AP": 39.9, "AP50": 60.1}, _TABLE_VII),
    "se_resnet101": PaperRow("SE-ResNet-101", {"AP": 41.9, "AP50": 62.7}, _TABLE_VII),
}


def has_gates(cfg: CfgNode) -> bool:
    """Return True if the config's backbone contains SE layers."""
    return bool(cfg.MODEL.SE.ENABLED) or cfg.MODEL.BACKBONE.ARCH.startswith("se")


def paper_row(cfg: CfgNode, data: str, task: str, images: float | None = None) -> PaperRow | None:
    """Return the paper's results for a run, or None if the paper reports no results for it.

    Args:
        cfg: The run's config.
        data: A dataset in ``DATASETS.TEST``.
        task: The task name, "bbox" or "classification".
        images: The number of evaluated images, if known.
    """
    backbone = backbone_name(cfg)
    if task == "bbox" and data in ("coco_2017_val", "coco_2014_minival"):
        fpn = cfg.MODEL.BACKBONE.NAME == "build_senet_fpn_backbone" and not cfg.MODEL.MASK_ON
        return COCO.get(backbone) if fpn else None
    if task != "classification":
        return None
    if found := published_on_cifar(data, backbone):
        return PaperRow(found.name, {"top1_error": found.top1_error}, found.source)
    if found := published_on_imagenet(cfg.DATASETS.CLASSES, backbone):
        return _row(found, _IMAGENET_IMAGES, images)
    if len(cfg.DATASETS.CLASSES) == 365:
        for row in PLACES365:
            if row.name.lower().replace("-", "") == backbone.replace("_", ""):
                return _row(row, _PLACES365_IMAGES, images)
    return None


def _row(found: Published, expected: int, images: float | None) -> PaperRow:
    values = {"top1_error": found.top1_error}
    if found.top5_error is not None:
        values["top5_error"] = found.top5_error
    short = images is not None and images != expected
    note = f"paper: {expected:,} images, this run: {images:,.0f}" if short else ""
    return PaperRow(found.name, values, found.source, note)
