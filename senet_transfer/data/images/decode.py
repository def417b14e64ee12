"""Image decoding.

This module reduces all images for detection and classification to 8 bits per channel. 16-bit values
are divided by 257 to map 0-65535 to 0-255. The value range of 32-bit integers, floating-point
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
import tifffile
from PIL import ExifTags, Image, ImageFile

from senet_transfer.data.images.file_types import FORMATS

# Limits memory use: a file of a few kilobytes can decode to gigabytes.
MAX_PIXELS = 100_000_000

_TURNED = range(2, 9)  # EXIF orientations of images that are not upright
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height

_SEPARATE_PLANES = 2  # the PlanarConfiguration of a TIFF file


@dataclass(frozen=True)
class Reading:
    """Settings for reading images; see also :func:`~.reading.reading_of`.

    Attributes:
        value_range: Values that are mapped to 0 and 255 in images with more than 8 bits per
            channel; see :func:`to_8_bit`.
        upright: Whether to apply the EXIF orientation. Pillow always applies the orientation of
            colour and grayscale TIFF files.
        channels: Expected number of channels, for images that are not converted to RGB. The
            channels are in the order of the file. None to convert images to RGB.
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
    """Return the bits per value of a PIL image: 8, 16 or 32. For 1-bit images, return 8."""
    # Pillow opens 16-bit PGM files in its mode for 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return 16
    return 32 if image.mode in ("I", "F") else 8


def exif_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of a PIL image, from 1 to 8.

    Return None if the image has no orientation or its EXIF data is broken. Also return None for
    TIFF files, because Pillow applies the orientation when it decodes these files.
    """
    if image.format == "TIFF":
        return None
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of many types for broken EXIF data
        return None


def size_of(image: Image.Image, *, upright: bool) -> tuple[int, int]:
    """Return the width and height of a PIL image.

    If ``upright`` is True, return the size after the EXIF orientation has been applied.
    """
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
        image: PIL image. It is returned unchanged if it has 8 bits per value.
        value_range: Values that are mapped to 0 and 255; empty to map the whole range of a 16-bit
            image.
        data: The encoded image. If ``data`` and ``value_range`` are given, 16-bit colour images are
            read with full precision. Otherwise, only their upper 8 bits are used, as in Pillow.

    Raises:
        BrokenImageError: If the image has 32 bits per value and no range is given, or if colours
            with more than 8 bits can't be read with full precision to apply the range.
    """
    bits = bits_of(image)
    if bits == 8:
        if value_range and data and has_deep_colours(image, data):
            return Image.fromarray(scale(deep_colours(image, data), value_range))
        if data and has_deep_planes(image):
            return Image.fromarray((deep_colours(image, data) >> 8).astype(np.uint8))
        return image
    if value_range:
        grey = scale(stored_values(image, data), value_range)
    elif bits == 16:
        grey = scale(np.asarray(image), (0, _white(image)))
    if value_range or bits == 16:
        return Image.fromarray(255 - grey if _white_is_zero(image) else grey)
    kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
    raise BrokenImageError(
        f"its pixels are {kind}, whose value range is unknown; set INPUT.VALUE_RANGE to [low, "
        "high], the pixel values of black and white, or convert the image to 8 bits per channel"
    )


def scale(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Map a range of values to 0-255. Clip values outside the range, and convert NaN to black."""
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(scaled, nan=0.0).clip(0, 255)).astype(np.uint8)


def stored_values(image: Image.Image, data: bytes = b"") -> np.ndarray:
    """Return the values of a grayscale PIL image, without Pillow's scaling to 16 bits."""
    # The tile is only known before decoding.
    maxval = _tile_arguments(image)[1:2] if image.format == "PPM" else ()
    values = np.asarray(image)
    if image.mode == "I" and maxval and isinstance(maxval[0], int):
        return np.rint(values * (maxval[0] / 65535))
    if image.mode == "I;16" and image.format == "JPEG2000" and data:
        return values >> (16 - jpeg2000_bits(data))
    return values


def has_deep_colours(image: Image.Image, data: bytes) -> bool:
    """Return True if Pillow reduces an image to 8 bits per channel when decoding it.

    Args:
        image: PIL image. It must not have been decoded yet, unless it is a PNG image.
        data: The encoded image.
    """
    if bits_of(image) > 8:
        return False
    if image.format == "PNG":
        return data[24] > 8  # the bit depth in the header
    if image.format == "PPM":
        maxval = _tile_arguments(image)[1:2]
        return any(isinstance(value, int) and value > 255 for value in maxval)
    if image.format == "TIFF":
        return _bits_per_sample(image) > 8
    if image.format == "JPEG2000":
        return jpeg2000_bits(data) > 8
    return image.format == "SGI" and any(tile[0] == "SGI16" for tile in getattr(image, "tile", ()))


def has_deep_planes(image: Image.Image) -> bool:
    """Return True for a TIFF file with separate planes and more than 8 bits per channel.

    Pillow reads wrong pixels from such a file if the file is not compressed.
    """
    if image.format != "TIFF" or _bits_per_sample(image) <= 8:
        return False
    tags = image.tag_v2  # type: ignore[attr-defined]
    return tags.get(ExifTags.Base.PlanarConfiguration) == _SEPARATE_PLANES


def deep_colours(image: Image.Image, data: bytes) -> np.ndarray:
    """Read a colour image with more than 8 bits per channel at full precision.

    Args:
        image: PIL image that has not been decoded yet.
        data: The encoded image.

    Returns:
        The values stored in the file, uint16 RGB ``(H, W, 3)``.

    Raises:
        BrokenImageError: If neither tifffile nor OpenCV reads the values with full precision.
    """
    planes = has_deep_planes(image)
    mode, form = image.mode, image.format
    image.load()  # OpenCV accepts truncated files.
    pixels = None
    if form == "TIFF":
        pixels = _tiff_colours(data)
    if pixels is None and not planes:
        # With this flag, OpenCV ignores the EXIF orientation.
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        pixels = None if found is None or found.ndim != 3 else found[:, :, 2::-1]
    if pixels is None or pixels.dtype != np.uint16 or mode not in ("RGB", "RGBA"):
        raise BrokenImageError(
            f"it is a {form} file with more than 8 bits per channel, whose values can't be read "
            "with full precision; convert the image to PNG, or to 8 bits per channel"
        )
    return np.ascontiguousarray(pixels)


def _tiff_colours(data: bytes) -> np.ndarray | None:
    """Return the first three channels of a TIFF file, or None if tifffile can't decode them.

    The orientation is applied, as in Pillow.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        if page.compression not in tifffile.TIFF.DECOMPRESSORS or page.samplesperpixel < 3:
            return None
        values = page.asarray()
        if page.planarconfig == _SEPARATE_PLANES:
            values = np.moveaxis(values, 0, -1)
        orientation = page.tags.valueof(ExifTags.Base.Orientation)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return turn_upright(values[:, :, :3], orientation)


def jpeg2000_bits(data: bytes) -> int:
    """Return the number of bits per channel of a JPEG 2000 file; 8 if it is unknown."""
    # The SIZ marker follows the start of the codestream. Its last bytes describe the channels.
    start = data.find(b"\xff\x4f\xff\x51")
    return (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 8


def _white(image: Image.Image) -> int:
    """Return the largest possible pixel value of a 16-bit grayscale PIL image."""
    # A TIFF file can also specify 12 bits.
    return (1 << (_bits_per_sample(image) if image.format == "TIFF" else 16)) - 1


def _bits_per_sample(image: Image.Image) -> int:
    return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))  # type: ignore[attr-defined]


def _white_is_zero(image: Image.Image) -> bool:
    """Return True for a TIFF image in which brighter pixels have lower values.

    Pillow inverts such images only if they have 8 bits per value.
    """
    tags = getattr(image, "tag_v2", {})
    return tags.get(ExifTags.Base.PhotometricInterpretation) == 0


def _tile_arguments(image: Image.Image) -> tuple:
    """Return the decoder arguments that Pillow stores in a PIL image, such as the raw mode."""
    tiles = getattr(image, "tile", ())
    arguments = tiles[0][3] if tiles else ()
    return arguments if isinstance(arguments, tuple) else (arguments,)


def to_rgb(image: Image.Image, reading: Reading, data: bytes = b"") -> Image.Image:
    """Convert a PIL image to RGB with 8 bits per channel.

    Args:
        image: PIL image.
        reading: Settings for reading the image; ``channels`` is ignored.
        data: The encoded image. If it is given and ``reading`` specifies a value range, 16-bit
            colour images are read with full precision; see :func:`to_8_bit`.

    Raises:
        BrokenImageError: If :func:`to_8_bit` cannot convert the image to 8 bits per channel.
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

    Unlike Pillow, this function scales images with more than 8 bits per channel instead of clipping
    them.

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
                raise BrokenImageError(
                    f"it contains {image.width}x{image.height} pixels; expected at most "
                    f"{MAX_PIXELS} pixels"
                )
            return to_rgb(image, reading, data)
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def largest_of_16_bits(data: bytes) -> int | None:
    """Return the maximum pixel value of a 16-bit image.

    The maximum of a 12-bit grayscale TIFF image is scaled to 16 bits.

    Returns:
        The maximum, or None if the image has 8 or 32 bits per channel, stores white as 0, or is a
        colour image that is neither a PNG nor a TIFF file.

    Raises:
        BrokenImageError: If the image cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=allowed_formats())
            if bits_of(image) == 16 and not _white_is_zero(image):
                return int(np.asarray(image).max()) * 65535 // _white(image)
            if image.format in ("PNG", "TIFF") and has_deep_colours(image, data):
                return int(deep_colours(image, data).max())
            return None
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


@functools.cache
def allowed_formats() -> list[str]:
    """Return the formats in ``FORMATS`` that the installed Pillow version can open."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def encode_exact(image: Image.Image) -> bytes:
    """Encode an image losslessly, so that `decode_exact` returns the same pixels."""
    stored = io.BytesIO()
    image.save(stored, "BMP")  # lossless and fast
    return stored.getvalue()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG image before its EXIF orientation is applied.

    Return None if simplejpeg can't decode the image or if it has more than ``MAX_PIXELS`` pixels.
    """
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
    """Return a JPEG image's EXIF orientation from 1 to 8; None if it is missing or unreadable."""
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
