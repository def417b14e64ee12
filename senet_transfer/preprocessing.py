"""Image preprocessing parameters and normalisation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Parameters for converting an image to a model's input. The defaults are torchvision's.

    Attributes:
        format: Channel order of the model's input, "RGB" or "BGR".
        mean: Mean to subtract, one value per channel in the order of ``format``, in 0-255 units.
        std: Standard deviation to divide by, in the same order and units.
        resize: Length in pixels to which the shorter side is resized for classification.
        crop: Side length in pixels of the center crop for classification.
        interpolation: Interpolation mode for resizing, "bilinear" or "bicubic".
    """

    format: str = "RGB"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"

    def channel_values(self) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation as tensors of shape ``(3, 1, 1)``."""
        return torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)


# Mean and std of the training images, which are neither resized nor cropped.
CIFAR10 = Preprocessing(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), resize=32, crop=32)
CIFAR100 = Preprocessing(mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4), resize=32, crop=32)


def normalise(images: Tensor, mean: Tensor, std: Tensor, format: str = "RGB") -> Tensor:
    """Normalise RGB images and reorder their channels as a model expects.

    Args:
        images: RGB images ``(N, 3, H, W)`` in 0-255 units, as uint8 or in the dtype of ``mean``.
        mean: Mean ``(3, 1, 1)``, in the channel order of ``format``.
        std: Standard deviation ``(3, 1, 1)``, in the channel order of ``format``.
        format: Channel order of the model's input, "RGB" or "BGR".

    Returns:
        Normalised images of the same shape, in the dtype of ``mean`` and the channel order of
        ``format``.
    """
    if format == "BGR":
        images = images.flip(1)
    return (images - mean) / std


def same_pixels(first: object, second: object) -> bool:
    """Return whether two channel orders, means or stds are equal, the latter within 0.005."""
    if not isinstance(first, list | tuple) or not isinstance(second, list | tuple):
        return first == second
    return len(first) == len(second) and all(
        abs(a - b) < 0.005 for a, b in zip(first, second, strict=True)
    )
