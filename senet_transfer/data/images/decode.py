"""Encoded images to pixels.

Evaluation decodes with Pillow alone, so that its numbers are those of the plain Pillow and
torchvision loop that everyone else runs. Training decodes JPEG with simplejpeg, three times as
fast and, with the libjpeg-turbo that both ship, equal to the last bit.
"""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

# What Pillow may open here. Some of its other readers start programs or are rarely exercised.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# A file of a few kilobytes can ask for gigabytes of pixels.
MAX_PIXELS = 100_000_000


class BrokenImageError(Exception):
    """An image that cannot be decoded. A sample to skip and count, not yet a reason to stop."""


def decode_exact(data: bytes) -> Image.Image:
    """Decodes as `PIL.Image.open(...).convert("RGB")` does.

    Raises:
        BrokenImageError: the image is truncated, damaged, too large or no image.
    """
    try:
        with warnings.catch_warnings():
            # Of palettes, metadata and sizes; what matters here raises.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(f"{image.width}x{image.height} pixels are too many")
            return image.convert("RGB")
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def encode_exact(image: Image.Image) -> bytes:
    """A file that `decode_exact` gives the same pixels of, for what decodes its samples itself."""
    stored = io.BytesIO()
    image.save(stored, "BMP")  # costs nothing and loses nothing
    return stored.getvalue()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that `decode_fast` can decode at a fraction of its size."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # CMYK has conventions of its own, which Pillow knows.
    usual = colorspace in ("YCbCr", "Gray", "RGB") and height * width <= MAX_PIXELS
    return (height, width) if usual else None


def decode_fast(data: bytes, min_size: int | None = None) -> np.ndarray:
    """Decodes for training.

    Args:
        data: an image of any format that `decode_exact` reads.
        min_size: let a JPEG be decoded at a half, quarter or eighth of its size as long as both
            sides stay at least this long. Faster, with other pixels.

    Returns:
        `(H, W, 3)` uint8, RGB.

    Raises:
        BrokenImageError: as `decode_exact`.
    """
    if size := jpeg_size(data):
        # Fractions between these take longer than the whole image.
        part = next((part for part in (8, 4, 2) if min_size and min(size) >= part * min_size), 1)
        least_height, least_width = (-(-side // part) if part > 1 else 0 for side in size)
        try:
            return simplejpeg.decode_jpeg(
                data, "RGB", min_height=least_height, min_width=least_width
            )
        except ValueError:
            pass  # Pillow has the last word on what is broken
    return np.asarray(decode_exact(data))
