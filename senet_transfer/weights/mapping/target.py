"""Description of the model that weights are loaded into: its tensors and layer options."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing, channels_of
from senet_transfer.weights.families import renaming as names
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.geometry import Geometry, built_geometry

# Buffers in old detector files. The config now sets their values.
_CONFIG_BUFFERS = ("pixel_mean", "pixel_std")


@dataclass(frozen=True)
class Target:
    """Model that weights are loaded into.

    Attributes:
        model: The model without its wrapper for distributed training.
        backbone: Backbone of the model, or the model itself if it is a backbone.
        tensors: Parameters and buffers, with the same names as in :class:`~.source.Source`.
        own_names: Name of each tensor in the model, keyed by its name in ``tensors``.
        outside: Names of the tensors outside the backbone and the classifier.
        architecture: Backbone architecture; None if it is unknown.
        geometry: Layer options of the backbone, such as the stride placement.
        unused: Names of a timm network's tensors that the backbone does not need.
    """

    model: nn.Module
    backbone: nn.Module
    tensors: dict[str, Tensor]
    own_names: dict[str, str]
    outside: frozenset[str]
    architecture: Architecture | None
    geometry: Geometry
    unused: frozenset[str] = frozenset()

    @property
    def has_frozen_norms(self) -> bool:
        """Return whether all batch norms of the backbone are frozen."""
        norms = [m for m in self.backbone.modules() if _is_norm(m)]
        return all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)

    @property
    def network(self) -> str:
        """Return the model name if timm builds the network, or an empty string otherwise."""
        return getattr(self.backbone, "model_name", "")

    def pixels(self) -> Preprocessing | None:
        """Return the channel order, mean and std if the model normalises images, otherwise None."""
        mean, std = (getattr(self.model, name, None) for name in _CONFIG_BUFFERS)
        if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
            return None
        own = self.backbone_preprocessing().format
        order = own if channels_of(own) else getattr(self.model, "input_format", None) or own
        # Restore the config's decimals: 123.675 is 123.67500305 in float32.
        mean, std = (
            tuple(round(value, 4) for value in tensor.flatten().tolist()) for tensor in (mean, std)
        )
        return Preprocessing(format=order, mean=mean, std=std)

    def backbone_preprocessing(self) -> Preprocessing:
        """Return the backbone's preprocessing, or the default if it is not specified."""
        found = getattr(self.backbone, "preprocessing", None)
        return found if isinstance(found, Preprocessing) else Preprocessing()


def _is_norm(module: nn.Module) -> bool:
    batch_norms = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    return isinstance(module, FrozenBatchNorm2d | batch_norms)


def target_of(model: nn.Module) -> Target:
    """Return the backbone, tensors and layer options of a model.

    Args:
        model: Backbone, classifier or detector, optionally wrapped for distributed training.

    Raises:
        UserError: If the model has a different type.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    for name in _CONFIG_BUFFERS:
        state.pop(name, None)
    prefix = names.backbone_prefix(state)
    backbone = model
    for part in filter(None, prefix.split(".")):
        backbone = getattr(backbone, part)
    if not isinstance(backbone, nn.Module) or not state:
        raise UserError(
            f"Weights can't be loaded into a {type(model).__name__}; expected a backbone, a "
            "classifier, or a Detectron2 detector with one of this project's backbones."
        )
    own_names = {names.canonical(name, prefix): name for name in state}
    tensors = {ours: state[name] for ours, name in own_names.items()}
    return Target(
        model=model,
        backbone=backbone,
        tensors=tensors,
        own_names=own_names,
        outside=frozenset(
            ours for ours, name in own_names.items() if names.is_outside_backbone(name, prefix)
        ),
        architecture=Architecture.of(tensors),
        geometry=built_geometry(backbone, _stages(model, backbone)),
        unused=getattr(backbone, "unused_tensors", frozenset()),
    )


def _stages(model: nn.Module, backbone: nn.Module) -> dict[str, nn.Module]:
    stages = {name: child for name, child in backbone.named_children() if name.startswith("res")}
    head: Any = getattr(model, "roi_heads", None)
    if isinstance(getattr(head, "res5", None), nn.Module):
        stages["res5"] = head.res5
    return stages


def fill(target: Target, values: dict[str, Tensor]) -> None:
    """Copy values into a model's parameters and buffers, whose shapes must match."""
    with torch.no_grad():
        for name, value in values.items():
            target.tensors[name].copy_(value)
