"""Image decoding.

Evaluation decodes images only with Pillow, so that its results match the usual pipeline of Pillow
and torchvision. Training decodes JPEG images with simplejpeg, which is three times as fast. Both
packages bundle libjpeg-turbo and return identical pixels.
"""

import functools
import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from senet_transfer.data.images.file_types import FORMATS

# Limits memory use: a file of a few kilobytes can decode to gigabytes.
MAX_PIXELS = 100_000_000


class BrokenImageError(Exception):
    """Error for an image that cannot be decoded. Training skips and counts such images."""


def decode_exact(data: bytes) -> Image.Image:
    """Decode an image like `PIL.Image.open(...).convert("RGB")`.

    Raises:
        BrokenImageError: If the data is truncated, damaged, too large or not an image.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about palettes, metadata and sizes. Relevant problems raise exceptions.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_formats())
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(f"{image.width}x{image.height} pixels exceed the size limit")
            return image.convert("RGB")
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> list[str]:
    """Return the formats that Pillow is allowed to open, without those of later versions."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def encode_exact(image: Image.Image) -> bytes:
    """Encode an image losslessly, so that `decode_exact` returns the same pixels."""
    stored = io.BytesIO()
    image.save(stored, "BMP")  # lossless and fast
    return stored.getvalue()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG image that simplejpeg can decode; None for other images."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # CMYK files follow several conventions, which only Pillow handles.
    usual = colorspace in ("YCbCr", "Gray", "RGB") and height * width <= MAX_PIXELS
    return (height, width) if usual else None


def decode_fast(data: bytes, min_size: int | None = None) -> np.ndarray:
    """Decode an image for training.

    Args:
        data: Encoded image in any format that `decode_exact` supports.
        min_size: Decode JPEG images at 1/2, 1/4 or 1/8 of their size if both sides keep at least
            this many pixels. This is faster, but changes the pixels. None to decode at full size.

    Returns:
        The image, uint8 RGB `(H, W, 3)`.

    Raises:
        BrokenImageError: If the data is truncated, damaged, too large or not an image.
    """
    if size := jpeg_size(data):
        # Decoding at other fractions is slower than decoding at full size.
        part = next((part for part in (8, 4, 2) if min_size and min(size) >= part * min_size), 1)
        least_height, least_width = (-(-side // part) if part > 1 else 0 for side in size)
        try:
            return simplejpeg.decode_jpeg(
                data, "RGB", min_height=least_height, min_width=least_width
            )
        except ValueError:
            pass  # Pillow decides whether the image is broken
    return np.asarray(decode_exact(data))
