"""Code that classify_onnx.py and detect_onnx.py share. It does not need torch.

Images are read in the same way as by senet_transfer/data/images/decode.py.
"""

import contextlib
import json
from collections.abc import Sequence

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# The formats in senet_transfer/data/images/file_types.py.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO",
           "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")  # fmt: skip


def open_model(path: str, task: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """Open a file from tools/export.py, and return a session and the file's metadata.

    Raises:
        SystemExit: If the file can't be read, or if it is for a different task.
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


def formats() -> list[str]:
    """Return the supported image formats, which Pillow reads without external programs."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def has_deep_colours(image: Image.Image) -> bool:
    """Return whether an opened image has 16-bit colours, which Pillow reduces to 8 bits."""
    if image.mode not in ("RGB", "RGBA") or not getattr(image, "tile", ()):
        return False
    codec, _, _, args = image.tile[0]  # type: ignore[attr-defined]  # of ImageFile
    args = args if isinstance(args, tuple) else (args,)
    return ";16" in str(args[0]) or (codec == "ppm" and args[1] > 255)


def read_image(
    path: str, value_range: Sequence[float] = (), *, upright: bool = False
) -> Image.Image:
    """Read an image with 8 bits per channel.

    Args:
        path: Path of the image.
        value_range: The values of black and white in images with 16 or 32 bits per channel, from
            the metadata of the ONNX file. If empty, 16-bit images have the range from 0 to 65535.
        upright: Whether to apply the EXIF orientation, from the metadata of the ONNX file.

    Raises:
        SystemExit: If the image can't be read, or its value range is unknown.
    """
    try:
        image: Image.Image = Image.open(path, formats=formats())
        deep_colours = has_deep_colours(image)
        # Pillow opens 16-bit PGM files in its mode for 32-bit integers.
        is_16_bit = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
        image.load()
        if upright:
            with contextlib.suppress(
                Exception
            ):  # Pillow raises exceptions of many types for broken EXIF data
                image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SystemExit(f"error: {path} can't be read as an image: {error}") from error
    if value_range and deep_colours:
        raise SystemExit(
            f"error: {path} is a colour image with 16 bits per channel, whose value range can't be "
            "applied here. Convert it to 8 bits per channel."
        )
    if value_range and (is_16_bit or image.mode in ("I", "F")):
        low, high = value_range
        values = (np.asarray(image).astype(np.float64) - low) * (255 / (high - low))
        image = Image.fromarray(np.rint(np.nan_to_num(values).clip(0, 255)).astype(np.uint8))
    elif is_16_bit:
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise SystemExit(
            f"error: {path} has 32 bits per channel, and the model was trained without a value "
            "range (INPUT.VALUE_RANGE). Convert it to 8 bits per channel."
        )
    return image
