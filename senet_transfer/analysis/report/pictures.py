"""Pictures small enough to be carried inside a page."""

import base64
import io

import numpy as np
from PIL import Image

QUALITY = 72


def data_uri(pixels: np.ndarray, side: int) -> tuple[str, tuple[int, int]]:
    """A picture as text that a browser shows.

    Args:
        pixels: uint8 RGB ``(H, W, 3)``.
        side: pixels that the longer side is reduced to.

    Returns:
        The address that holds a JPEG, and its width and height.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size
