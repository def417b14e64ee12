#!/usr/bin/env python
"""Detect objects with an ONNX file from tools/export.py, without torch.

python tools/detect_onnx.py detector.onnx photo.jpg more/*.jpg --output detections.json

The detections are written in the COCO results format, with the file name of each image. The script
requires onnxruntime, Pillow and numpy. For masks, it also requires pycocotools. The file
onnx_images.py must be in the same folder.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from onnx_images import open_model, print_any_name, read_image  # noqa: E402


def resized(width: int, height: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return the width and height to which Detectron2 resizes an image."""
    if min_size == 0:
        return width, height
    scale = min_size / min(width, height)
    new_width, new_height = width * scale, height * scale
    if width <= height:
        new_width = min_size
    else:
        new_height = min_size
    if max(new_width, new_height) > max_size:
        scale = max_size / max(new_width, new_height)
        new_width, new_height = new_width * scale, new_height * scale
    return max(int(new_width + 0.5), 1), max(int(new_height + 0.5), 1)


def paste(mask: np.ndarray, box: np.ndarray, width: int, height: int) -> np.ndarray:
    """Paste the mask probabilities of a detected box into the image, and return a mask (H, W)."""

    def weights(start: float, end: float, length: int, size: int) -> np.ndarray:
        """Return the weights for bilinear interpolation along one axis, as (length, size).

        Args:
            start: Position of the left or upper side of the box in the image, in pixels.
            end: Position of the right or lower side of the box.
            length: Width or height of the image.
            size: Width or height of the mask.
        """
        positions = (np.arange(length) + 0.5 - start) / (end - start) * size - 0.5
        return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(size)))

    x1, y1, x2, y2 = box
    rows, columns = mask.shape
    return weights(y1, y2, height, rows) @ mask @ weights(x1, x2, width, columns).T >= 0.5


def detect(session: InferenceSession, metadata: dict, image: Image.Image) -> list[dict]:
    """Detect objects in an image, and return them in COCO format, sorted by score."""
    image = image.convert("L" if metadata["format"] == "L" else "RGB")
    size = resized(*image.size, metadata["min_size"], metadata["max_size"])
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR).convert("RGB"), np.float32)
    names = [output.name for output in session.get_outputs()]
    # The exported network includes the channel order and the normalisation.
    outputs = session.run(names, {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1))})
    found = dict(zip(names, outputs, strict=True))
    scale = np.array(image.size * 2, np.float32) / np.array(size * 2, np.float32)
    boxes = np.clip(found["boxes"] * scale, 0, np.array(image.size * 2, np.float32))
    # Without known ids, the first class has the id 1, as in COCO.
    ids = metadata["category_ids"] or range(1, 1 + found["classes"].max(initial=0) + 1)
    objects = []
    for index in np.nonzero((boxes[:, 2:] > boxes[:, :2]).all(1))[0]:
        x1, y1, x2, y2 = boxes[index].tolist()
        objects.append(
            {
                "category_id": ids[found["classes"][index]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(found["scores"][index]),
            }
        )
        if "masks" in found:
            from pycocotools import mask

            pasted = paste(found["masks"][index], boxes[index], *image.size)
            encoded = mask.encode(np.asfortranarray(pasted, np.uint8))
            objects[-1]["segmentation"] = {**encoded, "counts": encoded["counts"].decode()}
    return objects


def main() -> None:
    """Detect objects in the images, print them, and write them to the output file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the ONNX file")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--output", default="detections.json", help="the JSON file to write")
    parser.add_argument("--threshold", type=float, default=0.0, help="minimum score")
    args = parser.parse_args()
    print_any_name()
    session, metadata = open_model(args.model, "detection")
    detections = []
    for image_id, path in enumerate(args.images, start=1):
        upright = metadata.get("upright", True)
        image = read_image(path, metadata["value_range"], upright=upright)
        objects = detect(session, metadata, image)
        objects = [each for each in objects if each["score"] >= args.threshold]
        detections += [{"image_id": image_id, "file_name": path, **each} for each in objects]
        print(f"{path}: {len(objects)} objects")
    Path(args.output).write_text(json.dumps(detections))
    print(f"{args.output}: {len(detections)} detections")


if __name__ == "__main__":
    main()
