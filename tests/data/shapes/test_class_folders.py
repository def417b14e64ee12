"""Tests for cropping objects in the shapes dataset into class folders."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from senet_transfer.data.shapes.class_folders import make_shape_classes
from senet_transfer.errors import UserError


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Write a shapes dataset with a single 8x8 image that contains one object."""
    folder = tmp_path / "shapes"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").mkdir()
    content = {
        "categories": [{"id": 1, "name": "disc"}],
        "images": [{"id": 1, "file_name": "000001.jpg", "width": 8, "height": 8}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 1, 4, 3], "area": 12}
        ],
    }
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    cv2.imwrite(str(folder / "val" / "000001.jpg"), np.full((8, 8, 3), 100, np.uint8))
    return folder


def test_objects_are_cut_out_by_their_boxes(shapes: Path, tmp_path: Path) -> None:
    output = make_shape_classes(shapes, tmp_path / "classes")
    assert cv2.imread(str(output / "disc" / "000001.jpg")).shape == (3, 4, 3)


@pytest.mark.parametrize("content", [None, b"\xff\xd8\xff\xe0"], ids=["missing", "truncated"])
def test_an_unreadable_image_is_an_error_that_names_it(
    shapes: Path, tmp_path: Path, content: bytes | None
) -> None:
    image = shapes / "val" / "000001.jpg"
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(UserError, match="Cannot read .*000001.jpg.*senet data shapes"):
        make_shape_classes(shapes, tmp_path / "classes")
    assert not (tmp_path / "classes").exists()
