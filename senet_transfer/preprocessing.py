"""What a model expects of an image."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input. The defaults are torchvision's.

    Attributes:
        format: the order of the channels, "RGB" or "BGR".
        mean: subtracted, a value a channel in the order of ``format``, in units of 0-255.
        std: divided by, likewise.
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


# Mean and std of the training images; whole images, as they are.
CIFAR10 = Preprocessing(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), resize=32, crop=32)
CIFAR100 = Preprocessing(mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4), resize=32, crop=32)
