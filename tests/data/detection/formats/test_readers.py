"""Tests that compare the readers of annotation formats with other tools.

`fixtures/README.md` lists the tools that computed the expected values, and their versions.
"""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from senet_transfer.data.detection.formats.prepare import import_dataset

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


def make_images(folder: Path, **sizes: tuple[int, int]) -> None:
    """Create black PNG images; two underscores in a name are replaced with a slash."""
    for name, size in sizes.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)


def objects(content: dict, file_name: str | None = None) -> list[dict]:
    """Return the objects in an image (by default, the first image) with their class names."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["file_name"]: image["id"] for image in content["images"]}
    number = images[file_name or next(iter(images))]
    items = [item for item in content["annotations"] if item["image_id"] == number]
    return [{**item, "label": names[item["category_id"]]} for item in items]


def corners(item: dict) -> list[float]:
    x, y, width, height = item["bbox"]
    return [x, y, x + width, y + height]


def assert_equals_supervision(content: dict, classes: list[str], annotations: dict) -> int:
    """Compare boxes and classes with those read by `supervision`; return the number of objects."""
    count = 0
    for image in content["images"]:
        mine, theirs = objects(content, image["file_name"]), annotations[image["file_name"]]
        found = np.array([corners(item) for item in mine]).reshape(-1, 4)
        np.testing.assert_allclose(found, theirs.xyxy.reshape(-1, 4), atol=1e-3, rtol=0)
        assert [item["label"] for item in mine] == [classes[i] for i in theirs.class_id]
        count += len(mine)
    return count


def by_name(annotations: dict) -> dict:
    return {Path(path).name: found for path, found in annotations.items()}


@pytest.fixture
def formats():
    """Import and return the dataset readers of `supervision`. The import takes about a second."""
    from supervision.dataset import formats
    from supervision.dataset.formats import labelme, pascal_voc, yolo  # noqa: F401

    return formats


@pytest.mark.long
def test_boxes_of_pascal_voc_equal_those_of_supervision_on_real_data(shared_data, formats):
    root = shared_data / "bccd"
    datasets, images = import_dataset("voc", root)
    assert images == str(root / "JPEGImages")
    assert {split: len(content["images"]) for split, content in datasets.items()} == {
        split: len((root / "ImageSets" / "Main" / f"{split}.txt").read_text().split())
        for split in ("train", "val", "test")
    }
    classes, found = [], {}
    for path in (root / "Annotations").iterdir():
        xml = ElementTree.parse(path).getroot()
        boxes, classes = formats.pascal_voc.detections_from_xml_obj(xml, classes, (1, 1))
        found[f"{path.stem}.jpg"] = boxes
    counts = [
        assert_equals_supervision(content, classes, by_name(found)) for content in datasets.values()
    ]
    assert sum(counts) == 4888
    assert datasets["train"]["categories"] == datasets["test"]["categories"]
    # According to grep, exactly two objects have xmin equal to xmax.
    tiny = [o for d in datasets.values() for o in d["annotations"] if o["bbox"][2:] == [1, 1]]
    assert len(tiny) == 2


@pytest.mark.long
def test_boxes_of_yolo_equal_those_of_supervision_on_real_data(shared_data, tmp_path, formats):
    from supervision import DetectionDataset

    names = sorted(path.name for path in (shared_data / "bccd" / "JPEGImages").iterdir())[:8]
    for name in names:
        (tmp_path / "train" / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(shared_data / "bccd" / "JPEGImages" / name, tmp_path / "train" / "images")
    classes, paths, found = formats.pascal_voc.load_pascal_voc_annotations(
        str(tmp_path / "train" / "images"), str(shared_data / "bccd" / "Annotations")
    )
    # The label files are written by `supervision`, not by this project.
    DetectionDataset(classes, paths, found).as_yolo(
        annotations_directory_path=str(tmp_path / "train" / "labels"),
        data_yaml_path=str(tmp_path / "data.yaml"),
    )
    with open(tmp_path / "data.yaml", "a") as file:
        file.write("train: ../train/images\n")  # as in Roboflow's exports
    classes, _, found = formats.yolo.load_yolo_annotations(
        str(tmp_path / "train" / "images"),
        str(tmp_path / "train" / "labels"),
        str(tmp_path / "data.yaml"),
    )
    found = {f"train/images/{name}": boxes for name, boxes in by_name(found).items()}
    datasets, _ = import_dataset("yolo", tmp_path)
    assert assert_equals_supervision(datasets["train"], classes, found) > 50


def test_yolo_polygons_are_masks_and_unlabelled_images_have_no_objects(tmp_path):
    make_images(tmp_path, images__train__a=(100, 80), images__train__b=(100, 80))
    make_images(tmp_path, images__val__c=(50, 50))
    for name in ("train/a", "val/c"):
        path = tmp_path / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1 0.1 0.25 0.5 0.25 0.5 0.75\n\n0 0.5 0.5 1.004 0.2\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: {0: a, 1: b}")
    datasets, _ = import_dataset("yolo", tmp_path / "data.yaml")
    polygon, box = objects(datasets["train"], "images/train/a.png")
    assert polygon["segmentation"] == [[10, 20, 50, 20, 50, 60]]
    assert (polygon["bbox"], polygon["area"], polygon["label"]) == ([10, 20, 40, 40], 800, "b")
    # The box is neither rounded to whole pixels nor clipped to the image.
    assert (box["bbox"], box["segmentation"]) == ([-0.2, 32, 100.4, 16], [])
    assert objects(datasets["train"], "images/train/b.png") == []
    assert datasets["train"]["_notes"] == [
        "1 images have no label file and are used as images without objects (in all splits "
        "together)"
    ]
    assert objects(datasets["val"])[0]["segmentation"] == [[5, 12.5, 25, 12.5, 25, 37.5]]


def rasterise(item: dict, width: int, height: int) -> np.ndarray:
    segmentation = item["segmentation"]
    if isinstance(segmentation, list):
        polygons = segmentation or [np.array(corners(item))[[0, 1, 2, 1, 2, 3, 0, 3]].tolist()]
        segmentation = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return coco_mask.decode(segmentation).astype(bool)


def test_labelme_shapes_have_the_pixels_of_labelme(tmp_path):
    make_images(tmp_path, images__a=(100, 80))
    (tmp_path / "labels").mkdir()
    shutil.copy(FIXTURES / "labelme.json", tmp_path / "labels" / "a.json")
    datasets, _ = import_dataset("labelme", tmp_path / "labels", tmp_path / "images")
    found = objects(datasets["train"], "a.png")
    assert [item["label"] for item in found] == [item["label"] for item in EXPECTED["labelme"]]
    for item, expected in zip(found, EXPECTED["labelme"], strict=True):
        size = {"size": [80, 100], "counts": expected["counts"]}
        theirs = coco_mask.decode(coco_mask.frPyObjects(size, 80, 100)).astype(bool)
        mine, (top, left, bottom, right) = rasterise(item, 100, 80), expected["yxyx"]
        # LabelMe's masks include the polygon's edge, so masks may differ by a pixel at the edge.
        pixel, padded = np.ones((3, 3), np.uint8), theirs.astype(np.uint8)
        assert not (mine & (cv2.dilate(padded, pixel) == 0)).any()
        assert not (~mine & (cv2.erode(padded, pixel, iterations=2) > 0)).any()
        difference = np.array(corners(item)) - (left, top, right, bottom)
        assert np.abs(difference).max() <= 1
    assert found[-1]["area"] == EXPECTED["labelme"][-1]["area"]  # a shape stored as a mask is exact
    assert [bool(item["segmentation"]) for item in found] == [False] + [True] * 5
    assert datasets["train"]["_notes"] == [
        "1 shapes of type line have no area and are skipped",
        "1 shapes of type point have no area and are skipped",
    ]


@pytest.mark.long
def test_labelme_boxes_equal_those_of_supervision(tmp_path, formats):
    make_images(tmp_path, a=(100, 80))
    content = json.loads((FIXTURES / "labelme.json").read_text())
    content["shapes"] = [
        s for s in content["shapes"] if s["shape_type"] in ("rectangle", "polygon")
    ]
    (tmp_path / "a.json").write_text(json.dumps({**content, "imagePath": "a.png"}))
    classes, _, found = formats.labelme.load_labelme_annotations(str(tmp_path), str(tmp_path))
    datasets, _ = import_dataset("labelme", tmp_path)
    assert assert_equals_supervision(datasets["train"], classes, by_name(found)) == 3


def assert_equals_datumaro(content: dict, file_name: str, expected: list[dict]) -> None:
    for item, other in zip(objects(content, file_name), expected, strict=True):
        assert item["label"] == other["label"]
        if "bbox" in other:
            assert item["bbox"] == pytest.approx(other["bbox"])
        if "polygon" in other:
            assert item["segmentation"][0] == pytest.approx(other["polygon"], abs=1e-3)
        if "pixels" in other:
            assert np.argwhere(rasterise(item, 100, 80)).tolist() == other["pixels"]


def test_cvat_images_equal_those_of_datumaro(tmp_path):
    make_images(tmp_path, images__a=(100, 80), images__sub__b=(64, 48), images__c=(64, 48))
    shutil.copy(FIXTURES / "cvat_images.xml", tmp_path / "annotations.xml")
    datasets, _ = import_dataset("cvat", tmp_path)
    content, expected = datasets["train"], EXPECTED["cvat_images"]
    assert [category["name"] for category in content["categories"]] == expected["classes"]
    for name in ("a", "sub/b"):
        assert_equals_datumaro(content, f"{name}.png", expected["images"][name])
    # Rotating the ellipse by 90 degrees exchanges its radii 10 and 5.
    (turned,) = objects(content, "c.png")
    assert turned["bbox"] == [25, 10, 10, 20]
    assert turned["area"] == pytest.approx(np.pi * 50, rel=2e-3)
    assert content["_notes"] == [
        "1 boxes are rotated and become polygons",
        "1 shapes of type points are skipped",
        "1 shapes of type polyline are skipped",
        "1 shapes of type tag are skipped",
    ]


def test_images_of_an_unknown_subset_of_cvat_are_read_as_train_with_a_note(tmp_path):
    make_images(tmp_path, a=(8, 8), b=(8, 8), c=(8, 8))
    image = '<image name="{}.png" width="8" height="8" subset="{}"/>'
    names = (("a", "default"), ("b", "Validation"), ("c", "Night"))
    lines = "".join(image.format(*pair) for pair in names)
    (tmp_path / "annotations.xml").write_text(f"<annotations>{lines}</annotations>")
    datasets, _ = import_dataset("cvat", tmp_path)
    files = {k: [image["file_name"] for image in v["images"]] for k, v in datasets.items()}
    assert files == {"train": ["a.png", "c.png"], "val": ["b.png"]}
    (note,) = datasets["train"]["_notes"]
    assert note.startswith("1 images are in the subset 'night', which is read as train")


def test_cvat_tracks_equal_those_of_datumaro(tmp_path):
    make_images(tmp_path / "images", **{f"frame_{i:06d}": (100, 80) for i in range(4)})
    shutil.copy(FIXTURES / "cvat_video.xml", tmp_path / "annotations.xml")
    datasets, _ = import_dataset("cvat", tmp_path)
    for name, expected in EXPECTED["cvat_video"]["images"].items():
        assert_equals_datumaro(datasets["train"], f"{name}.png", expected)
    assert objects(datasets["train"], "frame_000003.png") == []


def test_label_studio_equals_its_own_conversion(tmp_path):
    make_images(tmp_path, a=(200, 200))
    shutil.copy(FIXTURES / "labelstudio.json", tmp_path / "export.json")
    datasets, _ = import_dataset("labelstudio", tmp_path / "export.json")
    content = datasets["train"]
    assert [image["file_name"] for image in content["images"]] == ["a.png"]
    for item, expected in zip(objects(content), EXPECTED["labelstudio"], strict=True):
        assert item["label"] == expected["label"]
        assert item["bbox"] == pytest.approx(expected["bbox"], abs=1e-3)
        if expected["segmentation"]:
            assert item["segmentation"] == expected["segmentation"]
    assert content["_notes"] == ["1 tasks have no annotation and are skipped"]


def test_label_studio_rotates_in_pixels_and_reads_json_min(tmp_path):
    make_images(tmp_path, images__sub__a=(200, 100))
    shape = {"original_width": 200, "original_height": 100, "image_rotation": 0}
    # Rotating the 40 x 10 box by 90 degrees around its top left corner (100, 20) makes it 10 x 40.
    box = {"x": 50, "y": 20, "width": 20, "height": 10, "rotation": 90, "rectanglelabels": ["a"]}
    ellipse = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 10, "ellipselabels": ["b"]}
    task = {"image": "/data/local-files/?d=data/sub/a.png", "id": 1, "annotator": 1}
    task["label"] = [{**shape, **box}, {**shape, **ellipse, "rotation": 0}]
    (tmp_path / "export.json").write_text(json.dumps([task]))
    datasets, images = import_dataset("labelstudio", tmp_path)
    assert images == str(tmp_path / "images")
    assert datasets["train"]["images"][0]["file_name"] == "sub/a.png"
    first, second = objects(datasets["train"])
    assert first["bbox"] == pytest.approx([90, 20, 10, 40])
    assert second["bbox"] == pytest.approx([80, 40, 40, 20])


def via_1(content: dict) -> dict:
    """Convert a VIA 2 project to the format of VIA 1's annotation exports."""
    images = content["_via_img_metadata"]
    return {
        key: {
            **{k: v for k, v in image.items() if k != "regions"},
            "fileref": "",
            "base64_img_data": "",
            "regions": {str(i): region for i, region in enumerate(image["regions"])},
        }
        for key, image in images.items()
    }


@pytest.mark.parametrize("version", [1, 2])
def test_via_equals_its_own_conversion(tmp_path, version):
    make_images(tmp_path, a=(100, 80), b=(30, 20))
    content = json.loads((FIXTURES / "via.json").read_text())
    content = via_1(content) if version == 1 else content
    (tmp_path / "via_region_data.json").write_text(json.dumps(content))
    datasets, _ = import_dataset("via", tmp_path)
    found = objects(datasets["train"], "a.png")
    assert [item["label"] for item in found] == ["cat", "dog", "cat", "dog"]
    for item, expected in zip(found, EXPECTED["via"], strict=True):
        # VIA approximates ellipses with polygons, whose boxes are slightly smaller.
        assert item["bbox"] == pytest.approx(expected["bbox"], abs=0.06)
    rectangle, circle, ellipse, polygon = (item["segmentation"] for item in found)
    theirs = [expected["segmentation"] for expected in EXPECTED["via"]]
    assert rectangle == []
    assert np.allclose([circle, ellipse], theirs[1:3], rtol=0, atol=1.1e-3)
    assert polygon == theirs[3]
    assert objects(datasets["train"], "b.png") == []
    assert datasets["train"]["images"][1]["width"] == 30
    assert datasets["train"]["_notes"] == [
        "1 shapes of type point have no area and are skipped",
        "1 shapes of type polyline have no area and are skipped",
    ]
