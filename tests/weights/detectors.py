"""Functions that build small detectors and compute the losses of the first training step."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from senet_transfer import get_senet_config

STAGES = ["res2", "res3", "res4", "res5"]


def config(arch: str, classes: int = 3, kind: str = "fpn") -> CfgNode:
    """Return a detector's config. ``kind`` is "fpn", "mask", "c4" or "retinanet"."""
    cfg = get_senet_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.ARCH = arch
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    if kind == "c4":
        cfg.MODEL.BACKBONE.NAME = "build_senet_backbone"
        cfg.MODEL.ROI_HEADS.NAME = "SENetRes5ROIHeads"
        return cfg
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = STAGES
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    if kind == "retinanet":
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_senet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = STAGES[1:]
        cfg.MODEL.RETINANET.NUM_CONVS = 1
        return cfg
    cfg.MODEL.BACKBONE.NAME = "build_senet_fpn_backbone"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    if kind == "mask":
        cfg.MODEL.MASK_ON = True
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    return cfg


def detector(arch: str, classes: int = 3, kind: str = "fpn", seed: int = 0, **keys) -> nn.Module:
    """Build a detector with the given ``MODEL.RESNETS`` keys."""
    cfg = config(arch, classes, kind)
    for key, value in keys.items():
        cfg.MODEL.RESNETS[key] = value
    torch.manual_seed(seed)
    return build_model(cfg)


def first_losses(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Return the losses of the first training step on a random image with one object."""
    generator = torch.Generator().manual_seed(0)
    truth = Instances((64, 96))
    truth.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 40.0, 50.0]]))
    truth.gt_classes = torch.tensor([1])
    truth.gt_masks = BitMasks(torch.ones(1, 64, 96, dtype=torch.bool))
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=generator)
    with EventStorage():
        losses = model.train()([{"image": image, "instances": truth, "height": 64, "width": 96}])
        sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}
