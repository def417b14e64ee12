"""Image decoding.

This module reduces all images for detection and classification to 8 bits per channel. 16-bit values
are divided by 257, which maps 0-65535 to 0-255. The value range of 32-bit integers, floating-point
numbers and 12-bit data stored in 16 bits must be set with ``INPUT.VALUE_RANGE``.

Evaluation decodes images only with Pillow, so that its results match the usual pipeline of Pillow
and torchvision. Training decodes JPEG images with simplejpeg, which is three times as fast. Both
packages bundle libjpeg-turbo and return identical pixels.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile

from senet_transfer.data.images.file_types import FORMATS

# Limits memory use: a file of a few kilobytes can decode to gigabytes.
MAX_PIXELS = 100_000_000

_TURNED = range(2, 9)  # EXIF orientations of images that are not upright
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Reading:
    """Settings for reading images; see also :func:`~.reading.reading_of`.

    Attributes:
        value_range: Values that are mapped to 0 and 255 in images with more than 8 bits per
            channel; see :func:`to_8_bit`.
        upright: Whether to apply the EXIF orientation. For colour and grey images in TIFF files,
            Pillow always applies the orientation.
        channels: Number of channels of images that are not converted to RGB, with the channels in
            the order of the file. None to convert images to RGB.
    """

    value_range: tuple[float, ...] = ()
    upright: bool = False
    channels: int | None = None


AS_STORED, UPRIGHT = Reading(), Reading(upright=True)
# For decoding an image only to check that it is complete.
ANY_RANGE = Reading(value_range=(0.0, 1.0))


class BrokenImageError(Exception):
    """Error for an image that cannot be decoded. Training skips and counts such images."""


def bits_of(image: Image.Image) -> int:
    """Return the number of bits per value of an opened image: 8, 16 or 32; 1-bit images have 8."""
    # Pillow opens 16-bit PGM files in its mode for 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return 16
    return 32 if image.mode in ("I", "F") else 8


def exif_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of an opened image, 1-8.

    None is returned if the image has no orientation, if its EXIF data is broken, and for TIFF
    files, because Pillow applies their orientation when it decodes them.
    """
    if image.format == "TIFF":
        return None
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of many types for broken EXIF data
        return None


def size_of(image: Image.Image, *, upright: bool) -> tuple[int, int]:
    """Return an opened image's width and height, after EXIF orientation if ``upright`` is True."""
    sideways = upright and exif_orientation(image) in SIDEWAYS
    return (image.height, image.width) if sideways else image.size


def turn_upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """Apply an EXIF orientation from 1 to 8 to pixels `(H, W, C)`."""
    if orientation in (2, 3, 7, 8):  # mirrored horizontally first
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels)


def to_8_bit(
    image: Image.Image, value_range: Sequence[float] = (), data: bytes = b""
) -> Image.Image:
    """Convert an image with 16 or 32 bits per value to 8 bits.

    Args:
        image: Opened image. It is returned unchanged if it has 8 bits per value.
        value_range: Values that are mapped to 0 and 255; empty to map the whole range of a 16-bit
            image.
        data: The encoded image. If ``data`` and ``value_range`` are given, 16-bit colour images are
            read with full precision. Otherwise, only their upper 8 bits are used, as in Pillow.

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
        "high], the values of black and white, or convert the image to 8 bits per channel"
    )


def scale(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Map a range of values to 0-255. Clip values outside the range, and convert NaN to black."""
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(scaled, nan=0.0).clip(0, 255)).astype(np.uint8)


def deep_colours(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return a 16-bit colour image as uint16 RGB `(H, W, 3)`; None for other images."""
    if image.mode not in ("RGB", "RGBA") or image.format not in ("PNG", "TIFF", "PPM"):
        return None
    # Pillow does not report the bit depth of colour images. The decoding with OpenCV ignores the
    # EXIF orientation.
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        return None
    return np.ascontiguousarray(pixels[:, :, 2::-1])


def to_rgb(image: Image.Image, reading: Reading, data: bytes = b"") -> Image.Image:
    """Convert an opened image to RGB with 8 bits per channel.

    Args:
        image: Opened image.
        reading: Settings for reading the image; ``channels`` is ignored.
        data: See :func:`to_8_bit`.

    Raises:
        BrokenImageError: If the image requires a value range.
    """
    orientation = exif_orientation(image) if reading.upright else None
    rgb = to_8_bit(image, reading.value_range, data).convert("RGB")
    if orientation not in _TURNED:
        return rgb
    return Image.fromarray(turn_upright(np.asarray(rgb), orientation))


@contextlib.contextmanager
def no_truncated_images() -> Iterator[None]:
    """Make Pillow raise an error for truncated files inside the context.

    The setting affects the whole process. If several threads decode images, enter this context
    once, around all threads.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_exact(data: bytes, reading: Reading = AS_STORED) -> Image.Image:
    """Decode an image like `PIL.Image.open(...).convert("RGB")`.

    In contrast to Pillow, images with more than 8 bits per channel are scaled, not clipped.

    Args:
        data: Encoded image.
        reading: Settings for reading the image; ``channels`` is ignored.

    Raises:
        BrokenImageError: If the data is truncated, damaged, too large or not an image.
    """
    try:
        with warnings.catch_warnings(), no_truncated_images():
            # Pillow warns about palettes, metadata and sizes, but raises exceptions for relevant
            # problems.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=allowed_formats())
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(f"{image.width}x{image.height} pixels exceed the size limit")
            return to_rgb(image, reading, data)
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


@functools.cache
def allowed_formats() -> list[str]:
    """Return the formats that Pillow may open. Formats added by later versions are excluded."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def encode_exact(image: Image.Image) -> bytes:
    """Encode an image losslessly: `decode_exact` returns the same pixels."""
    stored = io.BytesIO()
    image.save(stored, "BMP")  # lossless and fast
    return stored.getvalue()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the stored (height, width) of a JPEG image that simplejpeg can decode, or None."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # Only Pillow handles the different conventions for CMYK files.
    usual = colorspace in ("YCbCr", "Gray", "RGB") and height * width <= MAX_PIXELS
    return (height, width) if usual else None


def jpeg_orientation(data: bytes) -> int | None:
    """Return the EXIF orientation of a JPEG image, 1-8; None if there is none."""
    try:
        return exif_orientation(Image.open(io.BytesIO(data), formats=["JPEG"]))
    except Exception:  # Pillow raises exceptions of many types for damaged files
        return None


def decode_fast(
    data: bytes, min_size: int | None = None, reading: Reading = AS_STORED
) -> np.ndarray:
    """Decode an image for training.

    Args:
        data: Encoded image in any format that `decode_exact` supports.
        min_size: Decode JPEG images at 1/2, 1/4 or 1/8 of their size if both sides keep at least
            this many pixels. This is faster, but changes the pixels. None to decode at full size.
        reading: Settings for reading the image; ``channels`` is ignored.

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
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=least_height, min_width=least_width
            )
            return turn_upright(pixels, jpeg_orientation(data)) if reading.upright else pixels
        except ValueError:
            pass  # Pillow decides whether the image is broken
    return np.asarray(decode_exact(data, reading))
