"""The paper's results for a run's network and data set."""

from dataclasses import dataclass

from detectron2.config import CfgNode

from senet_transfer.evaluation.paper_results import PLACES365, published_on_cifar
from senet_transfer.models.build import backbone_name

_TABLE_VII = "Squeeze-and-Excitation Networks, Table VII"
_PLACES365_IMAGES = 36_500


@dataclass(frozen=True)
class PaperRow:
    """Published results of one network on one data set.

    Attributes:
        name: Network name.
        values: Values in percent, by Detectron2 metric name.
        source: Publication and table.
        note: Limitation of the comparison. Empty if there is none.
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
    """Return True if the config's backbone has SE."""
    return bool(cfg.MODEL.SE.ENABLED) or cfg.MODEL.BACKBONE.ARCH.startswith("se")


def paper_row(cfg: CfgNode, data: str, task: str, images: float | None = None) -> PaperRow | None:
    """Return the paper's results for a run, or None if the paper reports no results for it.

    Args:
        cfg: The run's config.
        data: A data set in ``DATASETS.TEST``.
        task: The task name, "bbox" or "classification".
        images: The number of evaluated images, if known.
    """
    backbone = backbone_name(cfg)
    if task == "bbox" and data in ("coco_2017_val", "coco_2014_minival"):
        fpn = cfg.MODEL.BACKBONE.NAME == "build_senet_fpn_backbone" and not cfg.MODEL.MASK_ON
        return COCO.get(backbone) if fpn else None
    if task == "classification" and (found := published_on_cifar(data, backbone)):
        return PaperRow(found.name, {"top1_error": found.top1_error}, found.source)
    if task == "classification" and len(cfg.DATASETS.CLASSES) == 365:
        for row in PLACES365:
            if row.name.lower().replace("-", "") == backbone.replace("_", ""):
                values = {"top1_error": row.top1_error}
                if row.top5_error is not None:
                    values["top5_error"] = row.top5_error
                short = images is not None and images != _PLACES365_IMAGES
                note = f"paper: {_PLACES365_IMAGES:,} images, this run: {images:,.0f}"
                return PaperRow(row.name, values, row.source, note if short else "")
    return None
