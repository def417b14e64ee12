"""Cutout (DeVries and Taylor 2017), as in the authors' released code.

A square of zeros in the normalised image, whose centre is any pixel, so that the square can reach
over the border.
"""

import torch
from torch import Tensor


def cut_out(images: Tensor, centres: Tensor, size: int) -> Tensor:
    """Return the images with a square of zeros in each.

    Args:
        images: normalised, `(N, C, H, W)`.
        centres: int64 `(N, 2)`, row and column. The square covers `size / 2` pixels before its
            centre and as many from its centre on, clipped at the border of the image.
        size: side of the square in pixels, even; 0 leaves the images unchanged.
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
