"""Parts that the builders of all backbones share: the container of stages, checks of options.

A builder is a function with keyword arguments only, all of which but its own have a default:

- ``se: SEOptions | None``: the SE variant; None is the plain network.
- ``norm``: Detectron2's name of a norm.
- ``in_channels``: channels of the image.
- ``out_features``: names of the stages to return; None is the last one.
- ``freeze_at``: number of stages to freeze, counted from the stem.
"""

import warnings
from collections.abc import Callable, Sequence

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SEOptions

FEATURES = ("stem", "res2", "res3", "res4", "res5")

# Of the networks for 32x32 images.
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
    """Return Detectron2's container of a stem and stages.

    Args:
        stem: the first block.
        stages: the blocks of each stage.
        out_features: the stages to return, of ``features``; None is the last one.
        freeze_at: number of stages to freeze, counted from the stem; 0 for none.
        features: the names of the stem and the stages.

    Raises:
        UserError: ``out_features`` or ``freeze_at`` is invalid.
    """
    _check_out_features(out_features, features)
    _check_freeze_at(freeze_at, features)
    return ResNet(stem, stages, out_features=out_features, freeze_at=freeze_at)


def trunk_builder(
    features: tuple[str, ...] = FEATURES,
) -> Callable[[Callable[..., StemAndStages]], Callable[..., ResNet]]:
    """Decorate a builder that returns a stem and stages, as version 0.1 had them.

    Deprecated, removed in version 0.3: state all keyword arguments and return
    :func:`build_backbone`. Options of the decorated function's own can be fixed when the model is
    registered, and not overridden later.

    Args:
        features: the names of the stem and the stages.
    """
    warnings.warn(
        "trunk_builder is deprecated and will be removed in version 0.3: return build_backbone("
        "stem, stages, out_features=out_features, freeze_at=freeze_at) from the builder.",
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


def _check_out_features(out_features: list[str] | None, features: tuple[str, ...]) -> None:
    """Raise UserError unless these are names of features, or None."""
    if out_features is None:
        return
    # Not lists alone: a LazyConfig has a sequence of its own.
    named = isinstance(out_features, Sequence) and not isinstance(out_features, str)
    named = named and len(out_features) > 0
    if not named or any(name not in features for name in out_features):
        raise UserError(
            f"out_features is {out_features!r}, expected a list with names of "
            f"{', '.join(features)}."
        )


def _check_freeze_at(freeze_at: int, features: tuple[str, ...]) -> None:
    """Raise UserError unless this many stages of a backbone can be frozen."""
    if type(freeze_at) is not int or freeze_at not in range(len(features) + 1):
        raise UserError(
            f"freeze_at is {freeze_at!r}, expected 0 (nothing) to {len(features)} (the stem and "
            f"res2 to {features[-1]})."
        )


def check_se(
    se: SEOptions | None,
    network: str,
    *,
    stages: tuple[int, ...],
    placements: tuple[str, ...] = ("standard",),
) -> None:
    """Raises UserError for what SE can't be in a network.

    Args:
        se: what is asked for; None for none.
        network: its name, for the message.
        stages: those that have something to gate.
        placements: those that mean something in it.
    """
    if se is None:
        return
    if se.placement not in placements:
        raise UserError(
            f"The SE placement is {se.placement!r}, and {network} has: {', '.join(placements)}. "
            "The others are of other kinds of residual blocks."
        )
    if se.relu_before:
        raise UserError(
            "A ReLU before the gate (se_relu_before) is of one family of ResNet-18 and -34, and "
            f"{network} doesn't have it. Leave it at False."
        )
    if not set(se.stages) & set(stages):
        raise UserError(
            f"The stages with SE are {tuple(se.stages)}, and {network} has something to gate in "
            f"{', '.join(map(str, stages))}. Name some of these, or take the network without SE."
        )


def stage_se(se: SEOptions | None, stage: int) -> SEOptions | None:
    """The SE of a stage: None where it has none."""
    return se if se is not None and stage in se.stages else None
