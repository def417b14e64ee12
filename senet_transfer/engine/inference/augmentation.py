"""Test-time augmentation for detectors."""

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from torch import nn

from senet_transfer.engine.inference.fused_detector import FusedDetector


def with_augmentation(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA | FusedDetector:
    """Return a detector with the test-time augmentation configured in ``TEST.AUG``.

    For a single R-CNN, this is Detectron2's :class:`GeneralizedRCNNWithTTA`, which also averages
    masks. For all other detectors, it is a :class:`FusedDetector`.

    Detectron2's default sizes, 400 to 1200 pixels, assume ``INPUT.MIN_SIZE_TEST: 800``. If
    ``TEST.AUG`` contains these defaults, they are scaled in proportion to ``INPUT.MIN_SIZE_TEST``.
    """
    theirs = get_cfg()
    aug, default = cfg.TEST.AUG, theirs.TEST.AUG
    factor = cfg.INPUT.MIN_SIZE_TEST / theirs.INPUT.MIN_SIZE_TEST
    same = [*aug.MIN_SIZES, aug.MAX_SIZE] == [*default.MIN_SIZES, default.MAX_SIZE]
    if same and factor not in (0, 1):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.AUG.MIN_SIZES = [max(1, round(factor * size)) for size in default.MIN_SIZES]
        cfg.TEST.AUG.MAX_SIZE = max(1, round(factor * default.MAX_SIZE))
    fused = isinstance(model, FusedDetector)
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and not fused:
        return GeneralizedRCNNWithTTA(cfg, model)
    models = list(model.models) if fused else [model]
    return FusedDetector(cfg, models, DatasetMapperTTA(cfg))
