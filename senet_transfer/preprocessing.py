"""Preprocessing that a model expects of its images."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an image to a model's input. The defaults are torchvision's.

    Attributes:
        format: the order of the channels, "RGB" or "BGR".
        mean: subtracted, one value per channel in the order of ``format``, in units of 0-255.
        std: divided by, one value per channel, in the same order and units.
        resize: the short side that an image is resized to for classification, in pixels.
        crop: the side of the central square that is classified, in pixels.
        interpolation: of the resizing, "bilinear" or "bicubic".
    """

    format: str = "RGB"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"

    def channel_values(self) -> tuple[Tensor, Tensor]:
        """Return mean and std as tensors ``(3, 1, 1)``."""
        return torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)


# Mean and std of the training images; whole images, as they are.
CIFAR10 = Preprocessing(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), resize=32, crop=32)
CIFAR100 = Preprocessing(mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4), resize=32, crop=32)


def normalise(images: Tensor, mean: Tensor, std: Tensor, format: str = "RGB") -> Tensor:
    """Convert RGB images to a model's input.

    Args:
        images: RGB ``(N, 3, H, W)`` in units of 0-255, uint8 or of the mean's type.
        mean: ``(3, 1, 1)``, in the order of ``format``.
        std: ``(3, 1, 1)``, in the order of ``format``.
        format: the model's order of channels, "RGB" or "BGR".

    Returns:
        Images of the same shape and of the mean's type, with channels in the order of ``format``.
    """
    if format == "BGR":
        images = images.flip(1)
    return (images - mean) / std
