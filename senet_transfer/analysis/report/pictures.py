"""Encoding of small images for embedding in an HTML page."""

import base64
import io

import numpy as np
from PIL import Image

QUALITY = 72


def data_uri(pixels: np.ndarray, side: int) -> tuple[str, tuple[int, int]]:
    """Encode an image as a data URI.

    Args:
        pixels: The RGB image, uint8 ``(H, W, 3)``.
        side: The maximum length of the longer side in pixels. Larger images are downscaled.

    Returns:
        The data URI of a JPEG image, and the image's width and height.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size
