"""Cutout (DeVries and Taylor 2017), as in the authors' released code.

Cutout sets a square in the normalised image to zero. The centre can be any pixel, so the square can
extend beyond the border.
"""

import torch
from torch import Tensor


def cut_out(images: Tensor, centres: Tensor, size: int) -> Tensor:
    """Return the images with one square per image set to zero.

    Args:
        images: Normalised images ``(N, C, H, W)``.
        centres: Row and column of each square's centre, int64 ``(N, 2)``. In each direction,
            the square covers the pixels from ``centre - size / 2`` to ``centre + size / 2 - 1``,
            clipped at the border of the image.
        size: Side length of the square in pixels, an even number; 0 leaves the images unchanged.
    """
    if not size:
        return images
    centres = centres.to(images.device)
    kept = [
        (torch.arange(length, device=images.device) - centres[:, axis, None] + size // 2)
        for axis, length in enumerate(images.shape[2:])
    ]
    rows, columns = ((distance < 0) | (distance >= size) for distance in kept)
    return images * (rows[:, None, :, None] | columns[:, None, None, :])
