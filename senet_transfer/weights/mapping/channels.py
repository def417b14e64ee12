"""Adaptation of weights for colour images to a different number of input channels."""

from dataclasses import replace

import torch
from torch import Tensor

from senet_transfer.preprocessing import channels_of
from senet_transfer.weights.mapping.source import Source
from senet_transfer.weights.mapping.target import Target

_COLOURS = 3


def adapt_channels(source: Source, target: Target) -> Source:
    """Adapt the first convolution of a network to the model's number of input channels.

    ``source`` is returned unchanged if the model's image format is RGB, BGR or L, or if the file's
    network does not expect colour images. Otherwise, the returned source contains a note about the
    adaptation.

    Args:
        source: Weight file, as returned by :func:`~.source.examine`.
        target: Model to load the file into.
    """
    pixels = target.pixels() or target.backbone_preprocessing()
    channels, own = channels_of(pixels.format), source.preprocessing
    if channels is None or own is None or channels_of(own.format) is not None:
        return source
    first = [
        name
        for name, tensor in source.tensors.items()
        if name.startswith("stem.") and tensor.ndim == 4 and tensor.shape[1] == _COLOURS
    ]
    if len(first) != 1:
        return source
    weight = source.tensors[first[0]]
    weight = weight.flip(1) if own.format == "BGR" else weight
    how = "sum of the weights for red, green and blue"
    if channels > 1:
        how = f"weights for red, green and blue, repeated and multiplied by 3/{channels}"
    adapted = replace(own, format=pixels.format, mean=pixels.mean, std=pixels.std)
    return replace(
        source,
        tensors={**source.tensors, first[0]: adapted_weight(weight, channels)},
        preprocessing=adapted,
        notes=(*source.notes, f"{first[0]} was adapted to {channels} channels: {how}"),
    )


def adapted_weight(weight: Tensor, channels: int) -> Tensor:
    """Adapt a convolution's weight for RGB images, ``(O, 3, H, W)``, to ``channels`` channels.

    As in timm, the weights of the three channels are summed if ``channels`` is 1. Otherwise, the
    weights are repeated cyclically (R, G, B, R, ...) and multiplied by ``3 / channels`` to keep the
    scale of the outputs.
    """
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = torch.arange(channels) % _COLOURS
    return (weight.float()[:, repeated] * (_COLOURS / channels)).to(weight.dtype)
