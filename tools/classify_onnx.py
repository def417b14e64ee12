#!/usr/bin/env python
"""Classify images with an ONNX file from tools/export.py, using only onnxruntime, Pillow and numpy.

python tools/classify_onnx.py se_resnet50.onnx photo.jpg more/*.jpg

The script requires onnx_images.py in the same folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from onnx_images import open_model, print_any_name, read_image  # noqa: E402


def resized(image: Image.Image, resize: int, mode: str) -> tuple[int, int]:
    """Return the width and height to which torchvision resizes an image."""
    if mode == "squash":
        return resize, resize
    short, long = sorted(image.size)
    length = int(resize * long / short)
    return (resize, length) if image.width <= image.height else (length, resize)


def load(
    image_file: str,
    preprocessing: dict,
    size: tuple[int, int],
    mode: str = "short_side",
    value_range: Sequence[float] = (),
    *,
    upright: bool = False,
) -> np.ndarray:
    """Load and resize an image, and take the crops used in evaluation.

    Args:
        image_file: Path of the image.
        preprocessing: The entry "preprocessing" in the metadata of the ONNX file.
        size: Height and width of the model's input.
        mode: The metadata entry "mode": "short_side" and "squash" take the central crop; "ten_crop"
            takes five crops each of the image and its mirror image.
        value_range: The metadata entry "value_range": the values of black and white in images with
            more than 8 bits per channel.
        upright: The metadata entry "upright". If True, the EXIF orientation is applied.

    Returns:
        Pixels in [0, 255], float32 ``(crops, 3, *size)``.
    """
    image = read_image(image_file, value_range, upright=upright).convert("RGB")
    height, width = size
    method = Image.Resampling[preprocessing["interpolation"].upper()]
    image = image.resize(resized(image, max(preprocessing["resize"], *size), mode), method)
    right, bottom = image.width - width, image.height - height
    corners = [(round(right / 2), round(bottom / 2))]
    if mode == "ten_crop":
        corners += [(0, 0), (right, 0), (0, bottom), (right, bottom)]
    images = [image]
    if mode == "ten_crop":
        images.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    crops = [
        np.asarray(view.crop((left, top, left + width, top + height)), np.float32)
        for view in images
        for left, top in corners
    ]
    return np.stack(crops).transpose(0, 3, 1, 2)


def main(model_file: str, *image_files: str) -> None:
    """Print the top five classes of each image."""
    print_any_name()
    session, metadata = open_model(model_file, "classification")
    # The exported network includes the channel order and the normalisation.
    preprocessing, classes = metadata["preprocessing"], metadata["classes"]
    if preprocessing["format"] not in ("RGB", "BGR", "L"):
        raise SystemExit(
            f"error: the model requires images in the format {preprocessing['format']}; expected "
            "RGB, BGR or L. Use tools/predict.py for models trained with INPUT.CHANNELS."
        )
    mode, value_range = metadata.get("mode", "short_side"), metadata.get("value_range", ())
    upright = metadata.get("upright", False)
    height, width = session.get_inputs()[0].shape[-2:]
    for image_file in image_files:
        size = (height, width)
        images = load(image_file, preprocessing, size, mode, value_range, upright=upright)
        logits = session.run(None, {"images": images})[0].mean(0)
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
