"""Decoding of images with any number of channels, such as multispectral images.

The supported files are NumPy arrays (.npy) of shape ``(H, W)`` or ``(H, W, C)``, TIFF files with
several bands, pages or both, and all other formats that Pillow reads. The channels are returned in
the order of the file.
"""

import io
import math
import warnings

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageSequence
from tifffile import PHOTOMETRIC

from senet_transfer.data.images.decode import (
    MAX_PIXELS,
    BrokenImageError,
    Reading,
    allowed_formats,
    bits_of,
    decode_fast,
    deep_colours,
    exif_orientation,
    has_deep_colours,
    scale,
    stored_values,
    turn_upright,
)

_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST = 16


def decode_channels(data: bytes, reading: Reading) -> np.ndarray:
    """Decode an image with a given number of channels.

    Args:
        data: Encoded image.
        reading: Settings with the expected number of channels. Without a value range, 8-bit values
            are unchanged, 16-bit values are divided by 257, and other values raise an error.

    Returns:
        The image, uint8 ``(H, W, C)``.

    Raises:
        BrokenImageError: If the data is damaged, too large or not an image, has a different number
            of channels, or requires a value range and none is set.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in decode_exact
            values = _values(data, reading)
    except BrokenImageError:
        raise
    except Exception as error:  # decoders raise exceptions of many types for damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error
    return to_channels(values, reading)


def to_channels(values: np.ndarray, reading: Reading) -> np.ndarray:
    """Convert the values of an image to 8 bits, and check its number of channels.

    The EXIF orientation is not applied.

    Args:
        values: Values of the image, ``(H, W)`` or ``(H, W, C)``.
        reading: See :func:`decode_channels`.

    Raises:
        BrokenImageError: If the number of channels is wrong, or if the data type requires a value
            range and none is set.
    """
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] != reading.channels:
        raise BrokenImageError(
            f"its shape is {values.shape}; expected (height, width, {reading.channels}), as set by "
            "INPUT.CHANNELS"
        )
    if reading.value_range and values.dtype != np.uint8:
        return scale(values, reading.value_range)
    if values.dtype == np.uint16:
        return scale(values, (0, 65535))
    if values.dtype != np.uint8:
        raise BrokenImageError(
            f"its values have the type {values.dtype}, whose value range is unknown; set "
            "INPUT.VALUE_RANGE to [low, high], the pixel values of black and white"
        )
    return np.ascontiguousarray(values)


def _values(data: bytes, reading: Reading) -> np.ndarray:
    """Decode an image to an array with the data type stored in the file."""
    if data.startswith(_NPY):
        values = np.load(io.BytesIO(data), allow_pickle=False)
    elif data.startswith(_TIFF):
        values = _tiff_values(data, reading)
    else:
        values = _pillow_values(data, reading)
    if values.dtype.kind not in "uif":
        raise BrokenImageError(f"its values have the type {values.dtype}; expected numbers")
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return the first three channels of an image ``(H, W, C)``.

    A single channel is repeated three times. For an image with two channels, the third is zero.
    """
    if pixels.shape[2] == 1:
        return pixels.repeat(3, axis=2)
    missing = max(3 - pixels.shape[2], 0)
    return np.ascontiguousarray(np.pad(pixels, ((0, 0), (0, 0), (0, missing)))[:, :, :3])


def decode_shown(data: bytes, reading: Reading, min_size: int | None = None) -> np.ndarray:
    """Decode an image for display, uint8 RGB ``(H, W, 3)``.

    Args:
        data: Encoded image.
        reading: Settings for reading the image. If they specify a number of channels, the first
            three channels are returned.
        min_size: See :func:`~senet_transfer.data.images.decode.decode_fast`.

    Raises:
        BrokenImageError: If the image cannot be decoded.
    """
    if reading.channels:
        return as_rgb(decode_channels(data, reading))
    return decode_fast(data, min_size, reading)


def _tiff_values(data: bytes, reading: Reading) -> np.ndarray:
    """Return the values of a TIFF file ``(H, W, C)``.

    Pillow is used for palette images, 1-bit images and compression methods that the installed
    tifffile does not support. Pillow supports at most four bands.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page, series = file.pages.first, file.series[0]
        supported = page.compression in tifffile.TIFF.DECOMPRESSORS
        if not supported or page.photometric == PHOTOMETRIC.PALETTE or page.bitspersample == 1:
            return _pillow_values(data, reading)
        _check_size(math.prod(series.shape))
        if len(file.series) > 1 or not {"Y", "X"} <= set(series.axes):
            raise BrokenImageError("its pages have different sizes; expected one image")
        sides = series.axes.index("Y"), series.axes.index("X")
        values = np.moveaxis(series.asarray(), sides, (0, 1))
        orientation = page.tags.valueof(ExifTags.Base.Orientation) if reading.upright else None
    return turn_upright(values.reshape(*values.shape[:2], -1), orientation)


def _pillow_values(data: bytes, reading: Reading) -> np.ndarray:
    image = Image.open(io.BytesIO(data), formats=allowed_formats())
    frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    _check_size(image.width * image.height * frames)
    orientation = exif_orientation(image) if reading.upright else None
    # Without a range, Pillow converts the values of other formats to 8 bits correctly.
    exact = reading.value_range or image.format in ("PNG", "TIFF")
    if frames == 1 and exact and has_deep_colours(image, data):
        return turn_upright(deep_colours(image, data), orientation)
    if frames == 1 and reading.value_range and bits_of(image) == 16:
        return turn_upright(stored_values(image, data)[:, :, None], orientation)
    pages = ImageSequence.Iterator(image) if frames > 1 else [image]
    parts = [np.asarray(page.convert("RGB") if page.mode == "P" else page) for page in pages]
    parts = [255 * part.astype(np.uint8) if part.dtype == bool else part for part in parts]
    return turn_upright(np.dstack(parts), orientation)


def _check_size(values: int) -> None:
    if values > MAX_PIXELS * _MOST:
        raise BrokenImageError(
            f"it contains {values} values; expected at most {MAX_PIXELS * _MOST} values"
        )
