"""Fixtures for the tests of detection datasets."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image


@pytest.fixture
def catalogs():
    """Restore Detectron2's catalogs to their previous state after a test."""
    datasets, metadata = dict(DatasetCatalog), dict(MetadataCatalog)
    contents = {name: dict(vars(value)) for name, value in metadata.items()}
    yield
    DatasetCatalog.data = datasets
    MetadataCatalog.data = metadata
    for name, content in contents.items():
        vars(metadata[name]).clear()
        vars(metadata[name]).update(content)


@pytest.fixture
def annotation():
    """Return a function that creates an annotation with all fields that COCO requires."""

    def make(number, image_id, category_id, bbox, **more):
        base = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox}
        return {**base, "area": bbox[2] * bbox[3], "iscrowd": 0, **more}

    return make


@pytest.fixture
def data(annotation):
    """Return the content of a small, valid annotation file for tests to modify."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 64, "height": 48},
            {"id": 3, "file_name": "b.png", "width": 32, "height": 40},
            {"id": 5, "file_name": "sub/c.png", "width": 32, "height": 40},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            annotation(1, 7, 9, [1, 2, 30, 40.5]),
            annotation(2, 7, 2, [10, 10, 54, 38]),
            annotation(3, 3, 2, [0, 0, 5, 5], iscrowd=1),
        ],
    }


@pytest.fixture
def files(tmp_path):
    """Return a function that writes an annotation file and images.

    The function returns the paths of the file and of the image folder.
    """

    def write(content, name="train.json"):
        images = tmp_path / "images"
        (images / "sub").mkdir(parents=True, exist_ok=True)
        for file_name, size in (("a.png", (64, 48)), ("b.png", (32, 40)), ("sub/c.png", (32, 40))):
            Image.new("RGB", size).save(images / file_name)
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path, images

    return write
