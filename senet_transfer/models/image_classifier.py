"""Detectron2 meta-architecture for image classification."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn
from torchvision.transforms.v2 import CutMix, MixUp

from senet_transfer.errors import UserError
from senet_transfer.layers.cutout import cut_out
from senet_transfer.models.build import backbone_from_config
from senet_transfer.models.classifier import Classifier
from senet_transfer.preprocessing import Preprocessing, normalise

_BACKBONE_BUILDER = "build_senet_backbone"


@META_ARCH_REGISTRY.register()
class ImageClassifier(Classifier):
    """Classifier that takes batches from a data loader and returns losses or logits.

    Its parameters have the same names as those of :class:`Classifier`, so weights are
    interchangeable.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        preprocessing: Preprocessing,
        dropout: float = 0.0,
        neck: Callable[..., nn.Module] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        cutout: int = 0,
        channels_last: bool = False,
    ):
        """
        Args:
            backbone: a backbone that returns one feature map.
            num_classes: number of classes.
            preprocessing: preprocessing that the backbone requires.
            dropout: dropout probability before the linear layer, in [0, 1).
            neck: see :class:`Classifier`.
            label_smoothing: label smoothing of the loss, in [0, 1).
            mixup: alpha of MixUp's Beta distribution (Zhang et al. 2018); 0 disables MixUp.
            cutmix: alpha of CutMix's Beta distribution (Yun et al. 2019); 0 disables CutMix. If
                both are enabled, one of the two is drawn for each batch.
            cutout: side length in pixels of the square that is set to zero around the centres in
                the batch's entry ``cutout``; 0 disables Cutout.
            channels_last: whether images and weights use the channels-last memory format.

        Raises:
            UserError: if the backbone returns several feature maps or a value is invalid.
        """
        super().__init__(backbone, num_classes=num_classes, dropout=dropout, neck=neck)
        if not 0 <= label_smoothing < 1 or mixup < 0 or cutmix < 0:
            raise UserError(
                f"label_smoothing is {label_smoothing}, expected a number >= 0 and < 1; mixup "
                f"is {mixup} and cutmix is {cutmix}, expected numbers >= 0 (MODEL.CLASSIFIER)."
            )
        backbone.preprocessing = preprocessing
        self.label_smoothing = label_smoothing
        self.cutout = cutout
        self.mixes = _mixes(num_classes, mixup, cutmix)
        self.input_format = preprocessing.format
        # Not persistent, so that checkpoints have the same tensors as those of any classifier.
        mean, std = preprocessing.channel_values()
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the arguments of the constructor for a config."""
        options = cfg.MODEL.CLASSIFIER
        dropout, neck = options.DROPOUT, None
        if cfg.MODEL.BACKBONE.NAME == _BACKBONE_BUILDER:
            cfg = cfg.clone()
            cfg.defrost()
            # An empty list selects the last stage. Detectron2's default is res4.
            cfg.MODEL.RESNETS.OUT_FEATURES = []
            # Detectors need aligned feature maps, but the published classifiers are not padded.
            cfg.MODEL.BACKBONE.PADDING = cfg.MODEL.BACKBONE.PADDING or "valid"
            entry, _ = backbone_from_config(cfg)
            dropout = entry.dropout if dropout is None else dropout
            neck = entry.neck
        return {
            "backbone": build_backbone(cfg),
            "num_classes": options.NUM_CLASSES,
            "preprocessing": preprocessing_of(cfg),
            "dropout": dropout or 0.0,
            "neck": neck,
            "label_smoothing": options.LABEL_SMOOTHING,
            "mixup": options.MIXUP,
            "cutmix": options.CUTMIX,
            "cutout": cfg.INPUT.CLASSIFICATION.CUTOUT,
            "channels_last": options.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.pixel_mean.device

    def normalise(self, images: Tensor) -> Tensor:
        """Convert uint8 RGB images ``(N, 3, H, W)`` on any device to the backbone's input."""
        images = images.to(self.device, non_blocking=True)
        images = normalise(images, self.pixel_mean, self.pixel_std, self.input_format)
        return images.contiguous(memory_format=self.memory_format)

    def forward(self, batch: dict[str, Any] | Tensor) -> dict[str, Tensor] | Tensor:
        """Classify a batch.

        Args:
            batch: a dict, whose entries other than these are ignored, or a tensor of normalised
                images ``(N, 3, H, W)``, as exporters pass it:

                - ``image``: uint8 RGB images ``(N, 3, H, W)``, or in evaluation
                  ``(N, V, 3, H, W)`` with V views of each image.
                - ``label``: int64 class indices ``(N,)``, in training only.
                - ``cutout``: int64 centres ``(N, 2)`` of the squares, in training with Cutout.

        Returns:
            In training, a dict with the loss; in evaluation, logits ``(N, num_classes)``, averaged
            over the views of an image. For a tensor, always logits.
        """
        if isinstance(batch, Tensor):
            return super().forward(batch)
        images = batch["image"]
        if self.training:
            images = self.normalise(images)
            if self.cutout and "cutout" in batch:
                images = cut_out(images, batch["cutout"], self.cutout)
            return self._losses(images, batch["label"])
        if images.dim() == 4:
            return super().forward(self.normalise(images))
        logits = super().forward(self.normalise(images.flatten(0, 1)))
        return logits.unflatten(0, images.shape[:2]).mean(1)

    def _losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        target = labels.to(self.device, non_blocking=True)
        if len(self.mixes):
            drawn = int(torch.randint(len(self.mixes), ()))
            images, target = self.mixes[drawn](images, target)
        logits = super().forward(images)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        return {"loss_cls": loss}


def preprocessing_of(cfg: CfgNode) -> Preprocessing:
    """Return the preprocessing of images for testing a classifier, from a config."""
    image = cfg.INPUT.CLASSIFICATION
    return Preprocessing(
        format=cfg.INPUT.FORMAT,
        mean=tuple(cfg.MODEL.PIXEL_MEAN),
        std=tuple(cfg.MODEL.PIXEL_STD),
        resize=image.TEST_RESIZE,
        crop=image.TEST_CROP,
        interpolation=image.INTERPOLATION,
    )


def _mixes(num_classes: int, mixup: float, cutmix: float) -> nn.ModuleList:
    """Return the enabled ones of MixUp and CutMix, given their alphas."""
    mixes = [(MixUp, mixup), (CutMix, cutmix)]
    return nn.ModuleList(
        mix(alpha=alpha, num_classes=num_classes) for mix, alpha in mixes if alpha > 0
    )


def wrap_classifier(classifier: Classifier) -> ImageClassifier:
    """Wrap a classifier from ``create_classifier`` so that it takes batches of a data loader.

    The result shares its modules with the given classifier.
    """
    wrapped = ImageClassifier(
        backbone=classifier.backbone,
        num_classes=classifier.linear.out_features,
        preprocessing=replace(classifier.preprocessing),
        dropout=classifier.dropout.p,
    )
    wrapped.neck = classifier.neck
    wrapped.linear = classifier.linear
    return wrapped
