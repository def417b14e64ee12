"""Batched augmentation of small images, with separate random parameters for each image.

Horizontal flips and random crops of padded images follow He et al. 2016, section 4.2. Images are
padded with zeros, or by reflection as in the code of Zagoruyko and Komodakis 2016. The centres of
the Cutout squares are also sampled here; :func:`~senet_transfer.layers.cutout.cut_out` erases the
squares after the model has normalised the images.

The parameters depend only on the seed and the iteration, not on the device or the number of
processes, so a resumed run gets the same images as an uninterrupted run.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from senet_transfer.errors import UserError, check_choice

PADDINGS = ("zero", "reflect")

# Random stream for the augmentation, independent of the stream for the sample order.
_STREAM = 1


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. Copies to a GPU are asynchronous."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class Draws:
    """Random augmentation parameters for N images.

    Attributes:
        flip: Whether to flip each image, bool `(N,)`.
        offset: Top and left edges of the crops in the padded images, in pixels, int64 `(N, 2)`.
        centre: Rows and columns of the Cutout squares' centres, in pixels, int64 `(N, 2)`.
    """

    flip: Tensor
    offset: Tensor
    centre: Tensor

    def part(self, rank: int, size: int) -> "Draws":
        """Return the augmentation parameters for the `size` images that a rank processes."""
        rows = slice(rank * size, (rank + 1) * size)
        return Draws(self.flip[rows], self.offset[rows], self.centre[rows])

    def to(self, device: torch.device) -> "Draws":
        """Copy the parameters to a device; see :func:`to_device`."""
        return Draws(
            *(to_device(values, device) for values in (self.flip, self.offset, self.centre))
        )


@dataclass(frozen=True)
class CifarAugment:
    """Augmentation used in the CIFAR recipes.

    Attributes:
        flip: Probability of a horizontal flip, 0-1.
        pad: Number of pixels to add on each side before cropping to the original size, 0-31.
        padding: Padding mode, "zero" or "reflect".
        cutout: Side length of the Cutout square in pixels, an even number; 0 disables Cutout.

    Raises:
        UserError: If a value is out of range.
    """

    flip: float = 0.5
    pad: int = 4
    padding: str = "zero"
    cutout: int = 0

    def __post_init__(self) -> None:
        check_choice("The padding", self.padding, PADDINGS)
        if not 0 <= self.flip <= 1 or not 0 <= self.pad < 32:
            raise UserError(
                f"flip is {self.flip} and pad is {self.pad}; expected a flip probability from 0 "
                "to 1 and a padding of 0 to 31 pixels."
            )
        if self.cutout < 0 or self.cutout % 2:
            raise UserError(
                f"cutout is {self.cutout}; expected an even number of pixels, or 0 to disable "
                "Cutout."
            )

    def draw(self, images: int, *, seed: int, iteration: int, side: int = 32) -> Draws:
        """Sample the augmentation parameters for a batch.

        Args:
            images: Number of images in the batch across all processes.
            seed: Non-negative random seed of the run.
            iteration: Iteration in which the batch is used; must be non-negative.
            side: Side length of the images, in pixels.
        """
        rng = np.random.default_rng((seed, iteration, _STREAM))
        flip = rng.random(images) < self.flip
        offset = rng.integers(0, 2 * self.pad + 1, (images, 2))
        centre = rng.integers(0, side, (images, 2))
        return Draws(*(torch.from_numpy(values) for values in (flip, offset, centre)))

    def move(self, images: Tensor, draws: Draws) -> Tensor:
        """Flip, pad and crop images.

        Args:
            images: Images of shape `(N, C, S, S)`, of any dtype and on any device.
            draws: Augmentation parameters for these images.

        Returns:
            The augmented images, with the shape, dtype and device of the input.
        """
        count, channels, side = images.shape[:3]
        pixel = torch.arange(side, device=images.device)
        draws = draws.to(images.device)
        flip, offset = draws.flip, draws.offset
        rows = offset[:, :1] + pixel
        # The crop is flipped instead of the image. The distribution is the same because the offsets
        # are distributed symmetrically.
        columns = offset[:, 1:] + torch.where(flip[:, None], side - 1 - pixel, pixel)
        size = side
        if self.padding == "zero":
            images = F.pad(images, (self.pad,) * 4)
            size += 2 * self.pad
        else:
            rows, columns = (_reflect(index - self.pad, side) for index in (rows, columns))
        index = (rows[:, :, None] * size + columns[:, None, :]).view(count, 1, -1)
        moved = images.flatten(2).gather(2, index.expand(-1, channels, -1))
        return moved.view(count, channels, side, side)


def _reflect(index: Tensor, side: int) -> Tensor:
    """Reflect out-of-range pixel indices at the image's border."""
    index = index.abs()
    return torch.where(index >= side, 2 * (side - 1) - index, index)
