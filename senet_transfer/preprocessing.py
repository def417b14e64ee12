"""Image preprocessing parameters and normalisation."""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Weights of red, green and blue in Pillow's conversion to grey (ITU-R 601), times 65536.
_LUMA = (19595, 38470, 7471)


@dataclass(frozen=True)
class Preprocessing:
    """Parameters for converting an image to a model's input. The defaults are those of torchvision.

    Attributes:
        format: Channel order of the model's input: "RGB" or "BGR", "L" for grayscale images, or a
            format such as "C5" for images with 5 channels, which keep the order of the file.
        mean: Mean to subtract, one value per channel in the order of ``format``, for pixel values
            from 0 to 255. With the format "L", three values mean that the network has three input
            channels. The grayscale image is then repeated in these channels, so the network can
            start from weights for colour images.
        std: Standard deviation to divide by, in the same order and for the same pixel values.
        resize: Length in pixels to which the shorter side is resized for classification.
        crop: Side length in pixels of the center crop for classification.
        interpolation: Interpolation mode for resizing, "bilinear" or "bicubic".
        mode: Evaluation mode for classification: "short_side", "squash" or "ten_crop".
        value_range: Pixel values of black and white in images with more than 8 bits per channel,
            for classification. If empty, the whole range of 16-bit images is used.
        upright: Whether to apply the EXIF orientation of images, for classification.
    """

    format: str = "RGB"
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    mode: str = "short_side"
    value_range: tuple[float, ...] = ()
    upright: bool = False

    def channel_values(self) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation as tensors of shape ``(C, 1, 1)``."""
        return torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)

    def grey(self) -> "Preprocessing":
        """Return the preprocessing for the same network with one grayscale input channel."""
        order = reversed(_LUMA) if self.format == "BGR" else iter(_LUMA)
        weights = [weight / 65536 for weight in order]
        mean, std = (
            round(sum(w * v for w, v in zip(weights, values, strict=True)), 3)
            for values in (self.mean, self.std)
        )
        return replace(self, format="L", mean=(mean,), std=(std,))

    def with_channels(self, count: int) -> "Preprocessing":
        """Return the preprocessing for images with ``count`` channels.

        All channels are normalised with the mean and standard deviation of grayscale images.
        """
        grey = self.grey()
        return replace(grey, format=f"C{count}", mean=grey.mean * count, std=grey.std * count)


def channels_of(format: str) -> int | None:
    """Return the number of channels of a format such as "C5", or None for RGB, BGR and L."""
    match = re.fullmatch(r"C([1-9][0-9]*)", format)
    return int(match[1]) if match else None


# Mean and std are those of the training images, which are neither resized nor cropped.
CIFAR10 = Preprocessing(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), resize=32, crop=32)
CIFAR100 = Preprocessing(mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4), resize=32, crop=32)


def normalise(images: Tensor, mean: Tensor, std: Tensor, format: str = "RGB") -> Tensor:
    """Normalise RGB images and convert them to the channel order that a model expects.

    Args:
        images: RGB images ``(N, 3, H, W)`` with values from 0 to 255, as uint8 or in the dtype of
            ``mean``. For a multispectral format such as "C5" (five channels), the shape is
            ``(N, 5, H, W)``.
        mean: Mean ``(C, 1, 1)``, in the channel order of ``format``.
        std: Standard deviation ``(C, 1, 1)``, in the channel order of ``format``.
        format: Channel order of the model's input, such as "RGB" or "BGR"; "L" converts the images
            to grayscale in the same way as Pillow.

    Returns:
        Normalised images ``(N, C, H, W)``, in the dtype of ``mean`` and the channel order of
        ``format``.
    """
    if format == "L":
        red, green, blue = images.to(mean.dtype).unbind(1)
        # All products and sums are exact in float32.
        grey = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 32768
        images = (grey / 65536).floor()[:, None]
    if format == "BGR":
        images = images.flip(1)
    return (images - mean) / std


def same_pixels(first: object, second: object) -> bool:
    """Return whether two channel orders, means or stds are equal.

    Lists of numbers are equal if their elements differ by less than 0.005.
    """
    if not isinstance(first, list | tuple) or not isinstance(second, list | tuple):
        return first == second
    return len(first) == len(second) and all(
        abs(a - b) < 0.005 for a, b in zip(first, second, strict=True)
    )
