"""Detectron2 meta-architecture for image classification."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn
from torchvision.transforms.v2 import CutMix, MixUp

from senet_transfer.errors import UserError, check_choice
from senet_transfer.layers.cutout import cut_out
from senet_transfer.layers.focal_loss import softmax_focal_loss
from senet_transfer.models.build import backbone_from_config
from senet_transfer.models.classifier import Classifier
from senet_transfer.preprocessing import Preprocessing, normalise

_BACKBONE_BUILDER = "build_senet_backbone"

LOSSES = ("cross_entropy", "focal")

# Maximum number of views to evaluate at a time. If a batch has more images, one view of each image
# is evaluated at a time.
_MAX_VIEWS = 32


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
        loss: str = "cross_entropy",
        focal_gamma: float = 2.0,
        class_weights: Sequence[float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        cutout: int = 0,
        channels_last: bool = False,
    ):
        """
        Args:
            backbone: Backbone that returns one feature map.
            num_classes: Number of classes.
            preprocessing: Preprocessing that the backbone requires.
            dropout: Dropout probability before the linear layer, in [0, 1).
            neck: Function that builds a module to replace the pooling; see :class:`Classifier`.
            label_smoothing: Label smoothing of the loss, in [0, 1).
            loss: Training loss, "cross_entropy" or "focal".
            focal_gamma: Focusing parameter of the focal loss, a non-negative number.
            class_weights: Weight of each class in the loss; None for equal weights.
            mixup: Alpha of MixUp's Beta distribution (Zhang et al. 2018); 0 disables MixUp.
            cutmix: Alpha of CutMix's Beta distribution (Yun et al. 2019); 0 disables CutMix. If
                MixUp is also enabled, one of the two is chosen at random for each batch.
            cutout: Side length in pixels of the squares that are set to zero; 0 disables Cutout.
                The centres of the squares are read from the batch's ``cutout`` entry.
            channels_last: Whether images and weights use the channels-last memory format.

        Raises:
            UserError: If the backbone returns several feature maps or a value is invalid.
        """
        super().__init__(backbone, num_classes=num_classes, dropout=dropout, neck=neck)
        if not 0 <= label_smoothing < 1 or mixup < 0 or cutmix < 0:
            raise UserError(
                f"label_smoothing is {label_smoothing} (expected a number >= 0 and < 1), mixup is "
                f"{mixup} and cutmix is {cutmix} (expected numbers >= 0). Set them in "
                "MODEL.CLASSIFIER."
            )
        check_choice("MODEL.CLASSIFIER.LOSS", loss, LOSSES)
        if class_weights is not None and len(class_weights) != num_classes:
            raise UserError(
                f"MODEL.CLASSIFIER.CLASS_WEIGHTS contains {len(class_weights)} values; expected "
                f"one for each of the {num_classes} classes."
            )
        backbone.preprocessing = preprocessing
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma if loss == "focal" else None
        weights = None if class_weights is None else torch.tensor(class_weights).float()
        self.register_buffer("class_weights", weights, persistent=False)
        self.cutout = cutout
        self.mixes = _mixes(num_classes, mixup, cutmix)
        self.input_format = preprocessing.format
        # Not persistent, so checkpoints contain the same tensors as those of a plain Classifier.
        mean, std = preprocessing.channel_values()
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments for a config."""
        options = cfg.MODEL.CLASSIFIER
        dropout, neck, weights = options.DROPOUT, None, options.CLASS_WEIGHTS
        if cfg.MODEL.BACKBONE.NAME == _BACKBONE_BUILDER:
            cfg = cfg.clone()
            cfg.defrost()
            # Detectors need aligned feature maps, but the published classifiers do not use padding.
            cfg.MODEL.BACKBONE.PADDING = cfg.MODEL.BACKBONE.PADDING or "valid"
            entry, _ = backbone_from_config(cfg)
            # An empty list selects the last stage. Detectron2's default is res4.
            cfg.MODEL.RESNETS.OUT_FEATURES = [entry.pooled] if entry.pooled else []
            dropout = entry.dropout if dropout is None else dropout
            neck = entry.neck
        return {
            "backbone": build_backbone(cfg),
            "num_classes": options.NUM_CLASSES,
            "preprocessing": preprocessing_of(cfg),
            "dropout": dropout or 0.0,
            "neck": neck,
            "label_smoothing": options.LABEL_SMOOTHING,
            "loss": options.LOSS,
            "focal_gamma": options.FOCAL_GAMMA,
            # "auto" is replaced at the start of training. Class weights are not needed for
            # evaluation.
            "class_weights": None if weights == "auto" else weights or None,
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
            batch: Tensor of normalised images ``(N, 3, H, W)``, as passed by exporters, or a dict
                with these entries (others are ignored):

                - ``image``: uint8 RGB images ``(N, 3, H, W)``, or in evaluation ``(N, V, 3, H, W)``
                  with V views (scales and crops) of each image.
                - ``label``: int64 class indices ``(N,)``, only in training.
                - ``cutout``: int64 centres ``(N, 2)`` of the squares, only in training with Cutout.

        Returns:
            A dict with the loss in training mode. In evaluation mode, or if ``batch`` is a tensor,
            logits ``(N, num_classes)``, which are averaged over the views of each image.
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
            return self.classify(images)
        # Evaluating all scales and crops in a single batch would need a lot of memory.
        parts = images.flatten(0, 1).split(max(len(images), _MAX_VIEWS))
        logits = torch.cat([self.classify(part) for part in parts])
        return logits.unflatten(0, images.shape[:2]).mean(1)

    def classify(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of uint8 images ``(N, 3, H, W)``."""
        return super().forward(self.normalise(images))

    def _losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        target = labels.to(self.device, non_blocking=True)
        if len(self.mixes):
            drawn = int(torch.randint(len(self.mixes), ()))
            images, target = self.mixes[drawn](images, target)
        logits = super().forward(images)
        options = {"weight": self.class_weights, "label_smoothing": self.label_smoothing}
        if self.focal_gamma is None:
            return {"loss_cls": F.cross_entropy(logits, target, **options)}
        return {"loss_cls": softmax_focal_loss(logits, target, gamma=self.focal_gamma, **options)}


def preprocessing_of(cfg: CfgNode) -> Preprocessing:
    """Return the test-time preprocessing that a classifier's config specifies."""
    image = cfg.INPUT.CLASSIFICATION
    return Preprocessing(
        format=cfg.INPUT.FORMAT,
        mean=tuple(cfg.MODEL.PIXEL_MEAN),
        std=tuple(cfg.MODEL.PIXEL_STD),
        resize=image.TEST_RESIZE,
        crop=image.TEST_CROP,
        interpolation=image.INTERPOLATION,
        mode=image.TEST_MODE,
        value_range=tuple(cfg.INPUT.VALUE_RANGE),
        upright=cfg.INPUT.EXIF == "apply",
    )


def _mixes(num_classes: int, mixup: float, cutmix: float) -> nn.ModuleList:
    """Return the MixUp and CutMix modules that are enabled by a positive alpha."""
    mixes = [(MixUp, mixup), (CutMix, cutmix)]
    return nn.ModuleList(
        mix(alpha=alpha, num_classes=num_classes) for mix, alpha in mixes if alpha > 0
    )


def wrap_classifier(classifier: Classifier) -> ImageClassifier:
    """Wrap a classifier from ``create_classifier`` so that it accepts data loader batches.

    The returned model shares its modules with the given classifier.
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
