"""Code shared by classify_onnx.py and detect_onnx.py. It does not require torch.

Images are read in the same way as by senet_transfer/data/images/decode.py.
"""

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# The formats in senet_transfer/data/images/file_types.py.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO",
           "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")  # fmt: skip


def open_model(path: str, task: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """Open an ONNX file from tools/export.py, and return its session and metadata.

    Raises:
        SystemExit: If the file can't be read, or if the task of its model is not ``task``.
    """
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises exceptions of many types
        raise SystemExit(f"error: {path} can't be read as an ONNX file: {error}") from error
    texts = session.get_modelmeta().custom_metadata_map
    try:
        metadata = {key: json.loads(text) for key, text in texts.items()}
    except ValueError:  # The file was written by another program.
        metadata = {}
    # Files exported by versions that supported only classifiers contain no task.
    found = metadata.pop("task", "classification") if "classes" in metadata else "unknown"
    if found != task:
        raise SystemExit(
            f"error: the task of {path} is {found}; expected {task}. classify_onnx.py runs "
            "classifiers and detect_onnx.py runs detectors, both exported by tools/export.py."
        )
    return session, metadata


def print_any_name() -> None:
    """Make ``print`` escape characters in file names that the terminal can't display."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def formats() -> list[str]:
    """Return the formats in ``FORMATS`` that the installed Pillow version can open."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def has_deep_colours(image: Image.Image, path: str) -> bool:
    """Return whether an image has more than 8 bits per channel and Pillow rescales its values."""
    if not getattr(image, "tile", ()):
        return False
    if image.format == "JPEG2000":  # The SIZ marker contains the number of bits.
        data = Path(path).read_bytes()
        start = data.find(b"\xff\x4f\xff\x51")
        bits = (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 8
        # Pillow scales grayscale values with 9 to 15 bits to 16 bits.
        return 8 < bits < 16 if image.mode == "I;16" else bits > 8
    if image.mode.startswith(("I", "F")):
        return False
    codec, _, _, args = image.tile[0]  # type: ignore[attr-defined]  # of ImageFile
    args = args if isinstance(args, tuple) else (args,)
    if image.format == "PPM":
        return isinstance(args[-1], int) and args[-1] > 255
    if image.format == "TIFF":
        return bits_per_sample(image) > 8
    return codec == "SGI16" or (image.format == "PNG" and ";16" in str(args[0]))


def bits_per_sample(image: Image.Image) -> int:
    """Return the largest number of bits per channel that a TIFF file specifies."""
    return max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Convert values to 8 bits, mapping ``low`` to 0 and ``high`` to 255."""
    values = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(values).clip(0, 255)).astype(np.uint8)


def read_image(
    path: str, value_range: Sequence[float] = (), *, upright: bool = False
) -> Image.Image:
    """Read an image and convert it to 8 bits per channel.

    Args:
        path: Path of the image.
        value_range: The pixel values of black and white in 16-bit and 32-bit grayscale images, from
            the metadata of the ONNX file. If empty, 16-bit images have the range from 0 to 65535.
        upright: The metadata entry "upright" of the ONNX file. If True, the EXIF orientation is
            applied.

    Raises:
        SystemExit: If the image can't be read, or its value range is unknown.
    """
    try:
        image: Image.Image = Image.open(path, formats=formats())
        deep_colours = has_deep_colours(image, path)
        # Pillow opens 16-bit PGM files in its mode for 32-bit integers, and scales the values.
        is_pgm = (image.mode, image.format) == ("I", "PPM")
        is_16_bit = image.mode.startswith("I;16") or is_pgm
        largest, maxval, tags = 65535, 65535, {}
        if is_pgm and isinstance(image.tile[0][3], tuple):  # type: ignore[attr-defined]
            maxval = image.tile[0][3][1]  # type: ignore[attr-defined]
        if image.format == "TIFF":
            tags = dict(image.tag_v2)  # type: ignore[attr-defined]
            largest = (1 << bits_per_sample(image)) - 1
        image.load()
        if upright:
            # Pillow raises exceptions of many types for broken EXIF data.
            with contextlib.suppress(Exception):
                image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SystemExit(f"error: {path} can't be read as an image: {error}") from error
    if tags.get(284) == 2 and deep_colours:
        raise SystemExit(
            f"error: {path} contains 16-bit colours in separate planes, which Pillow can't read. "
            "Convert the image to 8 bits per channel."
        )
    if value_range and deep_colours:
        raise SystemExit(
            f"error: Pillow rescales the pixel values of {path}, which has more than 8 bits per "
            "channel, so the model's value range can't be applied. Convert the image to 8 bits "
            "per channel."
        )
    if value_range and (is_16_bit or image.mode in ("I", "F")):
        values = np.asarray(image)
        values = np.rint(values * (maxval / 65535)) if maxval < 65535 else values
        grey = scaled(values, *value_range)
    elif is_16_bit:
        grey = scaled(np.asarray(image), 0, largest)
    elif image.mode in ("I", "F"):
        raise SystemExit(
            f"error: {path} has 32 bits per channel, and the model was trained without a value "
            "range (INPUT.VALUE_RANGE). Convert the image to 8 bits per channel."
        )
    else:
        return image
    white_is_zero = tags.get(262) == 0
    return Image.fromarray(255 - grey if white_is_zero else grey)
