"""Augmentation of small images, for a whole batch at once but drawn for each image.

Flip, padding and random crop: He et al. 2016, section 4.2; zeros around the image, or its
reflection as in the code of Zagoruyko and Komodakis 2016. The centres of Cutout's squares are drawn
here; :func:`~senet_transfer.layers.cutout.cut_out` takes them after the model's normalisation.

What is drawn follows from a seed and the iteration alone, whatever the device or the number of
processes, so that a run which resumes goes on with the images that the unbroken run had.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from senet_transfer.errors import UserError, check_choice

PADDINGS = ("zero", "reflect")

# Tells the random numbers of augmentation from those of the order.
_STREAM = 1


@dataclass(frozen=True)
class Draws:
    """What was drawn for N images.

    Attributes:
        flip: bool `(N,)`.
        offset: int64 `(N, 2)`, top and left of the crop in the padded image, in pixels.
        centre: int64 `(N, 2)`, row and column of Cutout's centre in the crop, in pixels.
    """

    flip: Tensor
    offset: Tensor
    centre: Tensor

    def part(self, rank: int, size: int) -> "Draws":
        """The part of one process, of `size` images."""
        rows = slice(rank * size, (rank + 1) * size)
        return Draws(self.flip[rows], self.offset[rows], self.centre[rows])


@dataclass(frozen=True)
class CifarAugment:
    """The augmentation of the recipes for CIFAR.

    Attributes:
        flip: the probability of a horizontal flip, 0-1.
        pad: pixels added on every side before the crop to the size that was.
        padding: "zero" or "reflect".
        cutout: the side of Cutout's square in pixels, even; 0 for none.

    Raises:
        UserError: a value outside of these.
    """

    flip: float = 0.5
    pad: int = 4
    padding: str = "zero"
    cutout: int = 0

    def __post_init__(self) -> None:
        check_choice("The padding", self.padding, PADDINGS)
        if not 0 <= self.flip <= 1 or not 0 <= self.pad < 32:
            raise UserError(
                f"flip is {self.flip} and pad {self.pad}; expected a probability of 0 to 1, and 0 "
                "to 31 pixels."
            )
        if self.cutout < 0 or self.cutout % 2:
            raise UserError(
                f"The side of Cutout is {self.cutout}, expected an even number of pixels or 0."
            )

    def draw(self, images: int, *, seed: int, iteration: int, side: int = 32) -> Draws:
        """Draws for a batch.

        Args:
            images: in the batch, of all processes together.
            seed: of the run, 0 or more.
            iteration: from 0 on.
            side: of the images, in pixels.
        """
        rng = np.random.default_rng((seed, iteration, _STREAM))
        flip = rng.random(images) < self.flip
        offset = rng.integers(0, 2 * self.pad + 1, (images, 2))
        centre = rng.integers(0, side, (images, 2))
        return Draws(*(torch.from_numpy(values) for values in (flip, offset, centre)))

    def move(self, images: Tensor, draws: Draws) -> Tensor:
        """Flips, pads and crops.

        Args:
            images: `(N, C, S, S)` of any type and device.
            draws: for these.

        Returns:
            The same shape, type and device.
        """
        count, channels, side = images.shape[:3]
        pixel = torch.arange(side, device=images.device)
        flip, offset = draws.flip.to(images.device), draws.offset.to(images.device)
        rows = offset[:, :1] + pixel
        # The crop is flipped rather than the image: the same augmentation, since an offset is as
        # likely as its mirror image.
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
    """Positions beyond the border as those on the other side of its last pixel."""
    index = index.abs()
    return torch.where(index >= side, 2 * (side - 1) - index, index)
