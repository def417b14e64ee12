"""Types of predictions made by Detectron2's meta-architectures."""

from detectron2.config import CfgNode

OBJECTS, PROPOSALS = "objects", "proposals"
PIXELS, PANOPTIC = "pixel classes", "panoptic segments"

# All other meta-architectures predict objects.
_OUTPUTS = {
    "SemanticSegmentor": {PIXELS},
    "PanopticFPN": {OBJECTS, PIXELS, PANOPTIC},
    "ProposalNetwork": {PROPOSALS},
}


def predicts(cfg: CfgNode) -> set[str]:
    """Return the set of a model's prediction types, such as ``{OBJECTS}`` for most detectors."""
    return set(_OUTPUTS.get(cfg.MODEL.META_ARCHITECTURE, {OBJECTS}))


def box_head(cfg: CfgNode) -> CfgNode:
    """Return the config node with a detector's number of classes, such as ``MODEL.ROI_HEADS``."""
    retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    return cfg.MODEL.RETINANET if retinanet else cfg.MODEL.ROI_HEADS


def predicts_rotated_boxes(cfg: CfgNode) -> bool:
    """Return whether a model predicts rotated boxes."""
    heads = cfg.MODEL.ROI_HEADS.NAME == "RROIHeads" and OBJECTS in predicts(cfg)
    return heads or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN"
