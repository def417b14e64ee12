#!/usr/bin/env python
"""Classify images with an ONNX file from tools/export.py, using only onnxruntime, Pillow and numpy.

python tools/classify_onnx.py se_resnet50.onnx photo.jpg more/*.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def load(image_file: str, preprocessing: dict, size: int) -> np.ndarray:
    """Load an image, resize its shorter side and take the central crop.

    Returns:
        Pixels in [0, 255], float32 ``(3, size, size)``.
    """
    image = Image.open(image_file).convert("RGB")
    scale = preprocessing["resize"] / min(image.size)
    width, height = (max(size, int(side * scale)) for side in image.size)
    method = Image.Resampling[preprocessing["interpolation"].upper()]
    image = image.resize((width, height), method)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, np.float32).transpose(2, 0, 1)


def main(model_file: str, *image_files: str) -> None:
    """Print the top five classes of each image."""
    session = onnxruntime.InferenceSession(model_file, providers=["CPUExecutionProvider"])
    # The exported network includes the channel order and the normalisation.
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing, classes = (json.loads(metadata[key]) for key in ("preprocessing", "classes"))
    size = session.get_inputs()[0].shape[-1]
    for image_file in image_files:
        images = load(image_file, preprocessing, size)[None]
        (logits,) = session.run(None, {"images": images})[0]
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[:5]
        names = [classes[index] if classes else f"class {index}" for index in best]
        rows = ", ".join(f"{n} {shares[i]:.1%}" for n, i in zip(names, best, strict=True))
        print(f"{image_file}: {rows}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
