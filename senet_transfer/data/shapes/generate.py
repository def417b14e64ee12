"""The shapes dataset: a small detection dataset that is rendered rather than downloaded.

It consists of a few hundred images of coloured shapes on textured backgrounds, with annotations in
COCO format. The shapes occlude each other, extend beyond the image and vary in size, as objects in
photographs do. The contrast is high enough to train a small detector from scratch on a CPU.
"""

import json
import logging
import tempfile
from pathlib import Path

import cv2
import numpy as np

from senet_transfer.data.shapes.render import (
    SHAPE_CLASSES,
    SHAPE_KEYPOINTS,
    SHAPE_SPLITS,
    ShapeObject,
    render_image,
)
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import first_of

__all__ = ["SHAPE_CLASSES", "SHAPE_SPLITS", "ShapeObject", "make_shapes", "render_image"]

TINY_IMAGES = 8

# Incremented whenever the images or annotations for a given seed change. A dataset written by an
# older release is then not mistaken for a current one.
VERSION = 3

JPEG_QUALITY = 92
CONTOUR_SCALE = 4

logger = logging.getLogger(__name__)


def make_shapes(
    output_dir: str | Path,
    seed: int = 0,
    train: int = 400,
    val: int = 100,
    *,
    quiet: bool = False,
) -> Path:
    """Render the dataset to a folder, unless the folder already contains it.

    The folder is created atomically, so an interrupted run leaves no incomplete folder behind. It
    contains the images `{train,val,tiny}/000001.jpg` and so on,
    `annotations/instances_{train,val,tiny}.json` in COCO format, and the settings in `shapes.json`.

    Args:
        output_dir: Folder to create. An existing folder must be empty or contain this dataset.
        seed: Non-negative random seed.
        train: Number of training images.
        val: Number of validation images.
        quiet: Whether to hide the progress bar.

    Returns:
        `output_dir` as a path.

    Raises:
        UserError: If the folder contains other data or cannot be written, or an argument is out of
            range. An existing folder is not changed in this case.
    """
    _check_numbers(seed, train, val)
    output_dir = Path(output_dir)
    # The path is resolved to keep a symbolic link to a folder on a different disk.
    target = output_dir.resolve()
    settings = {"version": VERSION, "seed": seed, "train": train, "val": val, "tiny": TINY_IMAGES}
    try:
        if _is_present(target, settings):
            logger.info(
                "%s already contains the shapes dataset (%s)", output_dir, _listed(settings)
            )
            return output_dir
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shapes-", dir=target.parent) as scratch:
            built = Path(scratch, "shapes")
            _write(built, settings, quiet)
            _move(built, target, settings)
    except OSError as error:
        raise UserError(
            f"Cannot write the shapes dataset to {output_dir}: {error}. Expected a writable "
            "location with a few megabytes of free space. Free up space or choose another folder."
        ) from error
    logger.info("Wrote the shapes dataset to %s (%s)", output_dir, _listed(settings))
    return output_dir


def _check_numbers(seed: int, train: int, val: int) -> None:
    if seed < 0 or train < 1 or val < 1:
        raise UserError(
            f"Cannot create a shapes dataset with seed={seed}, train={train}, val={val}; "
            "expected a non-negative seed and at least 1 image per split. Correct these values."
        )


def _listed(settings: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _is_present(target: Path, settings: dict[str, int]) -> bool:
    """Return True if a folder contains the dataset, or False if it is empty or does not exist.

    Raises:
        UserError: If the folder contains other data, or the path is a file.
    """
    if not target.exists():
        return False
    if not target.is_dir():
        found: str | None = "a file"
    elif not any(target.iterdir()):
        return False
    else:
        found = _difference(target, settings)
        if found is None:
            return True
    raise UserError(
        f"{target} already exists and is {found}; expected a new or empty folder, or the shapes "
        f"dataset with {_listed(settings)}. Nothing was changed. Move {target}, or choose a "
        "different folder."
    )


def _difference(target: Path, settings: dict[str, int]) -> str | None:
    """Describe how a non-empty folder differs from the dataset.

    Return None if there is no difference.
    """
    try:
        found = json.loads((target / "shapes.json").read_text())
    except FileNotFoundError:
        names = sorted(path.name for path in target.iterdir())
        return f"a folder without shapes.json that contains {first_of(names, 5)}"
    except (OSError, ValueError) as error:
        return f"a folder with an unreadable shapes.json ({error})"
    if found != settings:
        listed = _listed(found) if isinstance(found, dict) else repr(found)
        return f"a dataset with different settings ({listed})"
    for split in SHAPE_SPLITS:
        images = len(list(target.glob(f"{split}/*.jpg")))
        if images != settings[split]:
            return f"a dataset with only {images} of {settings[split]} images in {split}/"
        if not _annotation_file(target, split).is_file():
            return f"a dataset without {_annotation_file(target, split).name}"
    return None


def _annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _move(built: Path, target: Path, settings: dict[str, int]) -> None:
    """Atomically move the finished folder to its final path."""
    try:
        built.replace(target)
    except OSError:
        # A concurrent run may have written the same dataset first.
        if not _is_present(target, settings):
            raise


def _write(root: Path, settings: dict[str, int], quiet: bool) -> None:
    """Write the dataset to a folder that does not exist yet."""
    (root / "annotations").mkdir(parents=True)
    total = sum(settings[split] for split in SHAPE_SPLITS)
    with progress(total=total, desc="shapes", unit="image", quiet=quiet) as bar:
        for split in SHAPE_SPLITS:
            (root / split).mkdir()
            images: list[dict] = []
            annotations: list[dict] = []
            for index in range(1, settings[split] + 1):
                image, objects = render_image(settings["seed"], split, index)
                name = f"{index:06d}.jpg"
                (root / split / name).write_bytes(_encode_jpeg(image))
                height, width = image.shape[:2]
                images.append({"id": index, "file_name": name, "width": width, "height": height})
                for shape in objects:
                    annotations.append(_annotation(shape, index, len(annotations) + 1))
                bar.update()
            text = json.dumps(_coco(images, annotations), separators=(",", ":"))
            _annotation_file(root, split).write_text(text)
    (root / "shapes.json").write_text(json.dumps(settings, indent=2) + "\n")


def _encode_jpeg(image: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _coco(images: list[dict], annotations: list[dict]) -> dict:
    return {
        "info": {"description": "senet_transfer shapes", "version": str(VERSION)},
        "licenses": [],
        "categories": [
            {
                "id": number,
                "name": name,
                "supercategory": "shape",
                "keypoints": list(SHAPE_KEYPOINTS),
                "skeleton": [],
            }
            for number, name in enumerate(SHAPE_CLASSES, start=1)
        ],
        "images": images,
        "annotations": annotations,
    }


def _annotation(shape: ShapeObject, image_id: int, annotation_id: int) -> dict:
    left, top, width, height = cv2.boundingRect(shape.mask.astype(np.uint8))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": SHAPE_CLASSES.index(shape.category) + 1,
        "bbox": [left, top, width, height],
        "area": int(shape.mask.sum()),
        "iscrowd": 0,
        "segmentation": _polygons(shape.mask),
        "keypoints": _keypoints(shape.mask),
        "num_keypoints": len(SHAPE_KEYPOINTS),
    }


def _keypoints(mask: np.ndarray) -> list[int]:
    """Return the outermost pixels of a mask (H, W) in the order of `SHAPE_KEYPOINTS`.

    Each keypoint consists of x, y and the COCO visibility flag 2, which means visible.
    """
    y, x = np.nonzero(mask)
    ends = (x.argmin(), x.argmax(), y.argmin(), y.argmax())
    return [value for end in ends for value in (int(x[end]), int(y[end]), 2)]


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Return polygons that cover a mask (H, W), as [x0, y0, x1, y1, ...] in pixels.

    OpenCV's contour runs through the centres of the outermost pixels, half a pixel inside the
    mask's edge. Tracing an enlarged mask reduces this offset to an eighth of a pixel.
    """
    scale = CONTOUR_SCALE
    enlarged = cv2.resize(
        mask.astype(np.uint8), None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST
    )
    contours, tree = cv2.findContours(enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for contour, (_, _, _, parent) in zip(contours, tree[0] if contours else [], strict=True):
        if parent != -1:
            # COCO polygons cannot have holes. Cutting the mask in two through a hole removes the
            # hole.
            cut = int(contour[:, 0, 0].mean()) // scale
            left, right = mask.copy(), mask.copy()
            left[:, cut:] = False
            right[:, :cut] = False
            return _polygons(left) + _polygons(right)
    # With a tolerance of half a pixel, even a single pixel keeps its corners.
    polygons = [cv2.approxPolyDP(contour, scale / 2, closed=True) for contour in contours]
    return [((polygon.reshape(-1) + 0.5) / scale).tolist() for polygon in polygons]
