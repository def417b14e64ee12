"""Functions for backbone builders: construction from stages, and validation of options.

A builder is a function that takes only keyword arguments. All builders have the following
arguments, with defaults:

- ``se: SEOptions | None``: SE variant; None builds the network without SE.
- ``norm``: Detectron2 norm name, such as "BN".
- ``in_channels``: Number of image channels.
- ``out_features``: Names of the stages whose outputs are returned; None for the last stage.
- ``freeze_at``: Number of stages to freeze, counted from the stem.
"""

import warnings
from collections.abc import Callable, Sequence

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SEOptions

FEATURES = ("stem", "res2", "res3", "res4", "res5")

# Feature names of networks for 32x32 images.
CIFAR_FEATURES = FEATURES[:4]

StemAndStages = tuple[CNNBlockBase, list[list[CNNBlockBase]]]


def build_backbone(
    stem: CNNBlockBase,
    stages: list[list[CNNBlockBase]],
    *,
    out_features: list[str] | None,
    freeze_at: int,
    features: tuple[str, ...] = FEATURES,
) -> ResNet:
    """Build a Detectron2 backbone from a stem and a list of stages.

    Args:
        stem: Stem, which is the first block of the network.
        stages: Blocks of each stage after the stem.
        out_features: Names from ``features`` of the stages whose outputs are returned; None for the
            last stage.
        freeze_at: Number of stages to freeze, counted from the stem; 0 freezes nothing.
        features: Names of the stem and the stages.

    Raises:
        UserError: If ``out_features`` or ``freeze_at`` is invalid.
    """
    check_out_features(out_features, features)
    check_freeze_at(freeze_at, features)
    return ResNet(stem, stages, out_features=out_features, freeze_at=freeze_at)


def trunk_builder(
    features: tuple[str, ...] = FEATURES,
) -> Callable[[Callable[..., StemAndStages]], Callable[..., ResNet]]:
    """Return a decorator for backbone builders that return a stem and stages, as in version 0.1.

    Deprecated: this decorator will be removed in version 0.3. Instead, write a builder that also
    accepts ``out_features`` and ``freeze_at`` and returns the result of :func:`build_backbone`.
    Additional arguments of the decorated function can only be set in
    :func:`senet_transfer.models.registry.register_model`.

    Args:
        features: Names of the stem and the stages.
    """
    warnings.warn(
        "trunk_builder is deprecated and will be removed in version 0.3. Instead, return "
        "build_backbone(stem, stages, out_features=out_features, freeze_at=freeze_at) from the "
        "builder.",
        DeprecationWarning,
        stacklevel=2,
    )

    def decorate(build: Callable[..., StemAndStages]) -> Callable[..., ResNet]:
        def build_whole(
            *,
            se: SEOptions | None = None,
            norm: str = "BN",
            in_channels: int = 3,
            out_features: list[str] | None = None,
            freeze_at: int = 0,
            **own: object,
        ) -> ResNet:
            stem, stages = build(se=se, norm=norm, in_channels=in_channels, **own)
            return build_backbone(
                stem, stages, out_features=out_features, freeze_at=freeze_at, features=features
            )

        return build_whole

    return decorate


def check_out_features(out_features: list[str] | None, features: tuple[str, ...]) -> None:
    """Raise a UserError unless ``out_features`` is None or a list of feature names."""
    if out_features is None:
        return
    # Accept any sequence, because lists in a LazyConfig are not instances of list.
    named = isinstance(out_features, Sequence) and not isinstance(out_features, str)
    named = named and len(out_features) > 0
    if not named or any(name not in features for name in out_features):
        raise UserError(
            f"out_features is {out_features!r}; expected a list of names from: "
            f"{', '.join(features)}."
        )


def check_freeze_at(freeze_at: int, features: tuple[str, ...]) -> None:
    """Raise a UserError unless ``freeze_at`` is a valid number of stages."""
    if type(freeze_at) is not int or freeze_at not in range(len(features) + 1):
        raise UserError(
            f"freeze_at is {freeze_at!r}; expected 0 (freeze nothing) to {len(features)} (freeze "
            f"the stem and res2 to {features[-1]})."
        )


def check_se(
    se: SEOptions | None,
    network: str,
    *,
    stages: tuple[int, ...],
    placements: tuple[str, ...] = ("standard",),
) -> None:
    """Raise a UserError if a network does not support an SE variant.

    Args:
        se: SE variant; None for a network without SE.
        network: Name of the network, for error messages.
        stages: Stages that can have gates.
        placements: Supported placements.
    """
    if se is None:
        return
    if se.placement not in placements:
        raise UserError(
            f"The SE placement is {se.placement!r}, but {network} supports only: "
            f"{', '.join(placements)}. Use one of these."
        )
    if se.relu_before:
        raise UserError(
            f"se_relu_before is True, but {network} does not support a ReLU before the gate. Set "
            "se_relu_before to False."
        )
    if not set(se.stages) & set(stages):
        raise UserError(
            f"The stages with SE are {tuple(se.stages)}, but {network} supports SE only in stages "
            f"{', '.join(map(str, stages))}. Choose from these, or use the network without SE."
        )


def stage_se(se: SEOptions | None, stage: int) -> SEOptions | None:
    """Return the options ``se`` if they enable SE in the stage, otherwise None."""
    return se if se is not None and stage in se.stages else None
