"""Merging of detections from several models or several augmented copies of an image."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from fvcore.transforms.transform import NoOpTransform, Transform
from torch import nn
from torchvision.ops import batched_nms

from senet_transfer.config.architectures import box_head
from senet_transfer.engine.inference.box_fusion import fuse_boxes
from senet_transfer.errors import UserError

_FIELDS = {"pred_boxes", "scores", "pred_classes"}


class FusedDetector(nn.Module):
    """One or more detectors of any meta-architecture, whose boxes are merged.

    Boxes from several models are merged by weighted boxes fusion. Boxes from several augmented
    copies of an image, called views, are merged by non-maximum suppression, as in Detectron2's
    test-time augmentation. If there are several models and several views, weighted boxes fusion
    merges all boxes. This module has the interface of Detectron2's meta-architectures.

    Attributes:
        models: The detectors.
    """

    def __init__(
        self,
        cfg: CfgNode,
        models: Sequence[nn.Module],
        views: DatasetMapperTTA | None = None,
    ):
        """
        Args:
            cfg: The config of the first model.
            models: Detectors with the same classes.
            views: A function that returns augmented copies of an image, called views. If None,
                only the image itself is used.
        """
        super().__init__()
        self.models = nn.ModuleList(models)
        # After an evaluation, Detectron2 restores this mode in all modules.
        self.training = models[0].training
        self.views = views
        self.nms = box_head(cfg).NMS_THRESH_TEST
        self.iou = cfg.TEST.ENSEMBLE.IOU
        self.limit = cfg.TEST.DETECTIONS_PER_IMAGE

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Return the merged ``instances`` of each image, on the CPU."""
        return [{"instances": self._merged(item)} for item in batched_inputs]

    def _merged(self, item: dict[str, Any]) -> Instances:
        height, width = item["image"].shape[-2:]
        item = {"height": height, "width": width, **item}
        size = (item["height"], item["width"])
        views = self._views(item)
        # Views of different sizes in one batch would be padded, which changes the predictions.
        found = [
            _restored(model([view])[0], inverse, size)
            for model in self.models
            for view, inverse in views
        ]
        boxes = [one.pred_boxes.tensor for one in found]
        scores, classes = [one.scores for one in found], [one.pred_classes for one in found]
        if len(self.models) > 1:
            merged = fuse_boxes(boxes, scores, classes, self.iou)
        else:
            united = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
            keep = batched_nms(*united, self.nms)
            merged = united[0][keep], united[1][keep], united[2][keep]
        fields = (field[: self.limit] for field in merged)
        return Instances(
            size, pred_boxes=Boxes(next(fields)), scores=next(fields), pred_classes=next(fields)
        )

    def _views(self, item: dict[str, Any]) -> list[tuple[dict[str, Any], Transform]]:
        """Return the augmented copies of an image, each with the inverse of its transform."""
        if self.views is None:
            return [(item, NoOpTransform())]
        found = []
        for view in self.views(item):
            # Models scale their boxes to this size; here, the boxes must fit the view.
            view["height"], view["width"] = view["image"].shape[-2:]
            found.append((view, view.pop("transforms").inverse()))
        return found


def _restored(output: dict[str, Any], inverse: Transform, size: tuple[int, int]) -> Instances:
    """Return the boxes of an augmented image on the CPU, in coordinates of the original image."""
    found = output.get("instances")
    fields = {} if found is None else found.get_fields()
    others = sorted((output.keys() - {"instances"}) | (fields.keys() - _FIELDS))
    if found is None or others or type(found.pred_boxes) is not Boxes:
        raise UserError(
            f"The model predicts {', '.join(others) or 'no axis-aligned boxes'}; expected only "
            "axis-aligned boxes. Ensembles of detectors and test-time augmentation of this "
            "meta-architecture support no other predictions. Use a single detector without "
            "test-time augmentation."
        )
    found = found.to("cpu")
    boxes = inverse.apply_box(found.pred_boxes.tensor.detach().numpy())
    boxes = Boxes(torch.from_numpy(boxes).float())
    boxes.clip(size)
    restored = Instances(
        size, pred_boxes=boxes, scores=found.scores, pred_classes=found.pred_classes
    )
    return restored[boxes.nonempty()]
