"""A backbone with a linear classifier on its last stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.modeling import Backbone
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.models.registry import (
    ModelEntry,
    build_backbone,
    examine_weights,
    model_entry,
)
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights.load import load_source
from senet_transfer.weights.mapping.source import Source


class Classifier(nn.Module):
    """Global average pooling, dropout and a linear layer on a backbone's only feature map."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        dropout: float = 0.0,
        neck: Callable[..., nn.Module] | None = None,
    ):
        """
        Args:
            backbone: a backbone that returns one feature map.
            num_classes: classes to tell apart.
            dropout: before the linear layer, 0-1.
            neck: what takes the place of the pooling, as in
                :class:`~senet_transfer.models.registry.ModelEntry`.

        Raises:
            UserError: the backbone returns several feature maps, or a value makes no sense.
        """
        super().__init__()
        shapes = backbone.output_shape()
        if len(shapes) != 1:
            raise UserError(
                f"A classifier takes one feature map, the backbone returns {', '.join(shapes)}. "
                "Build the backbone with one name in out_features."
            )
        whole = type(num_classes) is int and num_classes >= 1
        if not whole or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UserError(
                f"num_classes is {num_classes!r}, expected a whole number from 1 on; "
                f"dropout is {dropout!r}, expected 0 up to, not including, 1."
            )
        ((self.feature, shape),) = shapes.items()
        self.backbone = backbone
        self.neck = None if neck is None else neck(shape.channels, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        width = shape.channels if self.neck is None else self.neck.out_channels
        self.linear = nn.Linear(width, num_classes)
        # Small, so that training starts from even class probabilities (Goyal et al. 2017).
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the model expects of an image."""
        return self.backbone.preprocessing

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        features = self.backbone(x)[self.feature]
        pooled = features.mean((2, 3)) if self.neck is None else self.neck(features)
        return self.linear(self.dropout(pooled))


def create_classifier(
    name: str,
    num_classes: int = 1000,
    weights: str | Path | None = None,
    family: str | None = None,
    *,
    dropout: float | None = None,
    **overrides: Any,
) -> Classifier:
    """Builds a classifier by name.

    Args:
        name: one of :func:`senet_transfer.list_models`.
        num_classes: classes to tell apart.
        weights: a weight file of any family, or a name of ``list_catalogue()``. Its classifier is
            taken where it has as many classes; where it has not, the new one starts untrained,
            which the log says.
        family: the file's family, where its names are those of several.
        dropout: before the classifier, 0-1; None is the network's own.
        overrides: as for :func:`senet_transfer.create_backbone`.

    Returns:
        A module from normalised images ``(N, 3, H, W)`` to logits ``(N, num_classes)``; its
        ``preprocessing`` says what it expects of an image.

    Raises:
        UserError: an unknown name or option, a value that makes no sense; a file that does not fit
            the network, or whose network an override contradicts.
    """
    entry = model_entry(name)
    if "out_features" in overrides:
        raise UserError("A classifier stands on the last stage: out_features can't be set.")
    source = examine_weights(weights, family)
    model = build_classifier(entry, num_classes, source, dropout=dropout, **overrides)
    if source is not None:
        load_source(model, source)
    return model


def build_classifier(
    entry: ModelEntry,
    num_classes: int,
    source: Source | None = None,
    *,
    dropout: float | None = None,
    **overrides: Any,
) -> Classifier:
    """Build the classifier of a registered model; see :func:`create_classifier`.

    Args:
        entry: the model.
        num_classes: the number of classes.
        source: the weight file that the classifier will be filled from, whose geometry it gets.
        dropout: before the linear layer, 0-1; None is the network's own.
        overrides: those of :func:`~senet_transfer.models.registry.build_backbone`.
    """
    return Classifier(
        build_backbone(entry, source, **overrides),
        num_classes=num_classes,
        dropout=entry.dropout if dropout is None else dropout,
        neck=entry.neck,
    )
