"""Small classification dataset of object crops from the shapes dataset."""

import json
import logging
import tempfile
from pathlib import Path

import cv2

from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)

# Number of images per class, which is sufficient for smoke tests.
PER_CLASS = 6


def make_shape_classes(shapes: Path, output_dir: Path, split: str = "val") -> Path:
    """Write object crops from the shapes dataset to a folder with one folder per class.

    The output folder is created atomically. An existing folder is kept unchanged.

    Args:
        shapes: Folder of the shapes dataset.
        output_dir: Folder to create.
        split: Split of the shapes dataset.

    Returns:
        `output_dir`.

    Raises:
        UserError: If an image cannot be read or the folder cannot be written.
    """
    if output_dir.exists():
        logger.info("%s already exists", output_dir)
        return output_dir
    content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files = {entry["id"]: entry["file_name"] for entry in content["images"]}
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shapes-", dir=output_dir.parent) as scratch:
            built = Path(scratch, "classes")
            for category, name in names.items():
                (built / name).mkdir(parents=True)
                found = [a for a in content["annotations"] if a["category_id"] == category]
                for annotation in sorted(found, key=lambda a: -a["area"])[:PER_CLASS]:
                    path = shapes / split / files[annotation["image_id"]]
                    image = cv2.imread(str(path))
                    if image is None:
                        raise UserError(
                            f"Cannot read {path}: it is missing or not an image. Delete {shapes} "
                            "and run `senet data shapes` to render the dataset again."
                        )
                    left, top, width, height = annotation["bbox"]
                    cut = image[top : top + height, left : left + width]
                    cv2.imwrite(str(built / name / f"{annotation['id']:06d}.jpg"), cut)
            built.replace(output_dir)
    except OSError as error:
        raise UserError(
            f"Cannot write {output_dir}: {error}. Choose a different folder."
        ) from error
    return output_dir
