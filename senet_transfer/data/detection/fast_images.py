"""Faster versions of Detectron2's image decoding and resizing.

Decoding with simplejpeg returns the same pixels as Pillow, because both libraries include
libjpeg-turbo. Upsampling with PyTorch returns slightly different pixels, so it is optional and only
used in training.
"""

from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from PIL import Image

from senet_transfer.data.images.decode import jpeg_size

_COLOURS = ("RGB", "BGR")


def decode_jpeg(data: bytes, image_format: str) -> np.ndarray | None:
    """Decode a JPEG file with simplejpeg.

    Args:
        data: Content of the JPEG file.
        image_format: Channel order of the result. Only "RGB" and "BGR" are supported.

    Returns:
        The same pixels as Pillow returns, uint8 `(H, W, 3)`. None if the format is not supported or
        the file is damaged; the caller must then decode the file with Pillow.
    """
    if image_format not in _COLOURS or jpeg_size(data) is None:
        return None
    try:
        return simplejpeg.decode_jpeg(data, image_format)
    except ValueError:
        return None


class FastResize(T.ResizeTransform):
    """Variant of Detectron2's `ResizeTransform` that upsamples images with PyTorch.

    The pixel values differ from Pillow's by at most 1, because both libraries use bilinear
    interpolation. Pillow is still used for downsampling, because it is faster than PyTorch. Pillow
    is also used for other interpolation modes, and for images that are not uint8 `(H, W, C)`.
    OpenCV is not used, because it may hang in forked worker processes: `fork` does not copy its
    threads.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image `(H, W)` or `(H, W, C)` to the new height and width."""
        interpolation = self.interp if interp is None else interp
        bilinear = interpolation == Image.Resampling.BILINEAR
        grows = self.new_h >= self.h and self.new_w >= self.w
        if not (bilinear and grows and img.dtype == np.uint8 and img.ndim == 3):
            return super().apply_image(img, interp)
        image = torch.from_numpy(np.array(img.transpose(2, 0, 1), order="C"))[None]
        size = (self.new_h, self.new_w)
        found = F.interpolate(image, size, mode="bilinear", align_corners=False)
        # The mapper returns images of shape (C, H, W). Keeping this memory layout saves a copy.
        return found[0].permute(1, 2, 0).numpy()


class FastResizeShortestEdge(T.ResizeShortestEdge):
    """Variant of Detectron2's `ResizeShortestEdge` that uses :class:`FastResize`."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Sample the new size as Detectron2 does, and return the resize transform."""
        found = super().get_transform(image)
        if not isinstance(found, T.ResizeTransform):
            return found
        return FastResize(found.h, found.w, found.new_h, found.new_w, found.interp)


class ChannelResize(T.ResizeTransform):
    """Variant of Detectron2's `ResizeTransform` that resizes each channel separately with Pillow.

    Pillow does not support images with more than four channels. In images with two or four
    channels, Pillow treats the last channel as an alpha channel.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image `(H, W, C)` to the new height and width."""
        bands = np.split(img, img.shape[2], axis=2)
        return np.concatenate([super(ChannelResize, self).apply_image(b, interp) for b in bands], 2)


class ChannelResizeShortestEdge(T.ResizeShortestEdge):
    """Variant of Detectron2's `ResizeShortestEdge` that uses :class:`ChannelResize`."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Sample the new size as Detectron2 does, and return the resize transform."""
        found = super().get_transform(image)
        if isinstance(found, T.ResizeTransform):
            return ChannelResize(found.h, found.w, found.new_h, found.new_w, found.interp)
        return found


def with_channel_resize(augmentations: Sequence[T.Augmentation]) -> list[T.Augmentation]:
    """Replace `ResizeShortestEdge` augmentations with :class:`ChannelResizeShortestEdge`."""
    return [_resized_by(ChannelResizeShortestEdge, augmentation) for augmentation in augmentations]


def with_fast_resize(augmentations: Sequence[T.Augmentation]) -> list[T.Augmentation]:
    """Replace `ResizeShortestEdge` augmentations with :class:`FastResizeShortestEdge`."""
    return [_resized_by(FastResizeShortestEdge, augmentation) for augmentation in augmentations]


def _resized_by(kind: type[T.ResizeShortestEdge], augmentation: T.Augmentation) -> T.Augmentation:
    if type(augmentation) is not T.ResizeShortestEdge:
        return augmentation
    style = "range" if augmentation.is_range else "choice"
    return kind(augmentation.short_edge_length, augmentation.max_size, style, augmentation.interp)
