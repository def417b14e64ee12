"""Image classifiers, which add a linear layer to a backbone's last feature map."""

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
    stated_options,
)
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights.load import load_source
from senet_transfer.weights.mapping.source import Source


class Classifier(nn.Module):
    """Classifier that adds global average pooling, dropout and a linear layer to a backbone."""

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
            backbone: Backbone that returns one feature map.
            num_classes: Number of classes.
            dropout: Dropout probability before the linear layer, in [0, 1).
            neck: Function that builds a module to replace the pooling; see
                :class:`~senet_transfer.models.registry.ModelEntry`.

        Raises:
            UserError: If the backbone returns several feature maps or a value is invalid.
        """
        super().__init__()
        shapes = backbone.output_shape()
        if len(shapes) != 1:
            raise UserError(
                f"A classifier expects one feature map, but the backbone returns "
                f"{', '.join(shapes)}. Build the backbone with a single name in out_features."
            )
        valid = type(num_classes) is int and num_classes >= 1
        if not valid or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UserError(
                f"num_classes is {num_classes!r} (expected an integer >= 1), and dropout is "
                f"{dropout!r} (expected a number >= 0 and < 1)."
            )
        ((self.feature, shape),) = shapes.items()
        self.backbone = backbone
        self.neck = None if neck is None else neck(shape.channels, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        width = shape.channels if self.neck is None else self.neck.out_channels
        self.linear = nn.Linear(width, num_classes)
        # Small initial weights give all classes nearly equal probabilities (Goyal et al. 2017).
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @property
    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing that the model requires."""
        return self.backbone.preprocessing

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self.linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``(N, num_classes)`` for normalised images ``(N, 3, H, W)``."""
        features = self.backbone(x)[self.feature]
        pooled = features.mean((2, 3)) if self.neck is None else self.neck(features)
        return self.linear(self.dropout(pooled))


def create_classifier(
    name: str,
    num_classes: int = 1000,
    weights: str | Path | None = None,
    family: str | None = None,
    *,
    prefix: str | None = None,
    ema: bool | str | None = None,
    head: str = "strict",
    dropout: float | None = None,
    **overrides: Any,
) -> Classifier:
    """Build a classifier by name.

    Args:
        name: Model name; see :func:`senet_transfer.list_models`.
        num_classes: Number of classes.
        weights: Path of a weight file of any family, or a name from ``list_catalogue()``. If the
            number of classes in the file differs from ``num_classes``, the linear layer is not
            loaded, and a message about the untrained layer is logged.
        family: Weight family of the file, such as "torchvision". Required only if several families
            use the same tensor names.
        prefix: Prefix of the network's tensor names in a file with several networks. See
            :func:`senet_transfer.load_weights` for details of ``prefix``, ``ema`` and ``head``.
        ema: Whether to load the averaged (EMA) weights. None follows the convention of the project
            that saved the file.
        head: "strict", or "ignore" to load a file without its classifier or projection head.
        dropout: Dropout probability before the linear layer, in [0, 1); None uses the network's
            default.
        overrides: Network options; see :func:`senet_transfer.create_backbone`.

    Returns:
        A module that maps normalised images ``(N, 3, H, W)`` to logits ``(N, num_classes)``. The
        module's attribute ``preprocessing`` describes the required preprocessing.

    Raises:
        UserError: If a name or option is unknown, a value is invalid, the weights do not match
            the network, or an option contradicts the network in the file.
    """
    entry = model_entry(name)
    if "out_features" in overrides:
        raise UserError(
            "out_features can't be set for a classifier, which always uses the last stage. Remove "
            "it, or use create_backbone."
        )
    stated = stated_options(entry, overrides)
    source = examine_weights(
        weights, family, prefix=prefix, ema=ema, head=head, stated=stated, network=entry.network
    )
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
        entry: Registered model.
        num_classes: Number of classes.
        source: Weight file that determines layer options of the network, such as the stride
            placement. Its weights are not loaded.
        dropout: Dropout probability before the linear layer, in [0, 1); None uses the network's
            default.
        overrides: Options of :func:`~senet_transfer.models.registry.build_backbone`.
    """
    out_features = [entry.pooled] if entry.pooled else None
    return Classifier(
        build_backbone(entry, source, out_features=out_features, **overrides),
        num_classes=num_classes,
        dropout=entry.dropout if dropout is None else dropout,
        neck=entry.neck,
    )
