"""Image decoding.

All images are reduced to 8 bits per channel here, for detection and classification. 16-bit values
are divided by 257, which maps 0-65535 to 0-255. The range of 32-bit integers and floating-point
numbers must be given (``INPUT.VALUE_RANGE``), as for 12-bit data stored in 16 bits.

Evaluation decodes images only with Pillow, so that its results match the usual pipeline of Pillow
and torchvision. Training decodes JPEG images with simplejpeg, which is three times as fast. Both
packages bundle libjpeg-turbo and return identical pixels.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile

from senet_transfer.data.images.file_types import FORMATS

# Limits memory use: a file of a few kilobytes can decode to gigabytes.
MAX_PIXELS = 100_000_000

_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height

# Value range for decoding an image only to check that it is whole.
ANY_RANGE = (0.0, 1.0)


class BrokenImageError(Exception):
    """Error for an image that cannot be decoded. Training skips and counts such images."""


def bits_of(image: Image.Image) -> int:
    """Return the number of bits per value of an opened image: 8, 16 or 32; 1-bit images have 8."""
    # Pillow opens 16-bit PGM files in its mode for 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return 16
    return 32 if image.mode in ("I", "F") else 8


def is_turned_sideways(orientation: int | None) -> bool:
    """Return whether an EXIF orientation swaps an image's width and height."""
    return orientation in _SIDEWAYS


def exif_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation, 1-8; None if there is none or the EXIF data is broken."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of many types for broken EXIF data
        return None


def to_8_bit(
    image: Image.Image, value_range: Sequence[float] = (), data: bytes = b""
) -> Image.Image:
    """Convert an image with 16 or 32 bits per value to 8 bits.

    Args:
        image: Opened image. It is returned unchanged if it has 8 bits per value.
        value_range: Values that are mapped to 0 and 255; empty to map the whole range of a 16-bit
            image.
        data: The encoded image, from which 16-bit colour images are read with their full precision
            if ``value_range`` is given. Otherwise, Pillow returns their upper 8 bits.

    Raises:
        BrokenImageError: If the image has 32 bits per value and no range is given.
    """
    bits = bits_of(image)
    if bits == 8:
        deep = deep_colours(image, data) if value_range and data else None
        return image if deep is None else Image.fromarray(scale(deep, value_range))
    values = np.asarray(image)
    if value_range:
        return Image.fromarray(scale(values, value_range))
    if bits == 16:
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
    raise BrokenImageError(
        f"its pixels are {kind}, whose value range is unknown; set INPUT.VALUE_RANGE to [low, "
        "high], the values of black and white, or convert it to 8 bits per channel"
    )


def scale(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Map the two values of a range to 0 and 255, and clip other values; NaN becomes black."""
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(scaled, nan=0.0).clip(0, 255)).astype(np.uint8)


def deep_colours(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return a 16-bit colour image as uint16 RGB `(H, W, 3)`; None for other images."""
    if image.mode not in ("RGB", "RGBA") or image.format not in ("PNG", "TIFF", "PPM"):
        return None
    # Pillow does not report the bits of colour images. OpenCV ignores the EXIF orientation here.
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        return None
    return np.ascontiguousarray(pixels[:, :, 2::-1])


@contextlib.contextmanager
def no_truncated_images() -> Iterator[None]:
    """Make Pillow raise an error for truncated files inside the context."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_exact(data: bytes, value_range: Sequence[float] = ()) -> Image.Image:
    """Decode an image like `PIL.Image.open(...).convert("RGB")`.

    In contrast to Pillow, images with more than 8 bits per channel are scaled, not clipped.

    Args:
        data: Encoded image.
        value_range: See :func:`to_8_bit`.

    Raises:
        BrokenImageError: If the data is truncated, damaged, too large or not an image.
    """
    try:
        with warnings.catch_warnings(), no_truncated_images():
            # Pillow warns about palettes, metadata and sizes. Relevant problems raise exceptions.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=allowed_formats())
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(f"{image.width}x{image.height} pixels exceed the size limit")
            return to_8_bit(image, value_range, data).convert("RGB")
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


@functools.cache
def allowed_formats() -> list[str]:
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


def decode_fast(
    data: bytes, min_size: int | None = None, value_range: Sequence[float] = ()
) -> np.ndarray:
    """Decode an image for training.

    Args:
        data: Encoded image in any format that `decode_exact` supports.
        min_size: Decode JPEG images at 1/2, 1/4 or 1/8 of their size if both sides keep at least
            this many pixels. This is faster, but changes the pixels. None to decode at full size.
        value_range: See :func:`to_8_bit`.

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
    return np.asarray(decode_exact(data, value_range))
