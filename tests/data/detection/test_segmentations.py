"""Tests for the validation of polygons and RLE masks in annotation files."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from pycocotools import mask as coco_mask

from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.dataset_checks import check_segmentations
from senet_transfer.data.detection.segmentations import segmentation_problem
from senet_transfer.errors import UserError

pytestmark = pytest.mark.usefixtures("catalogs")

WIDTH, HEIGHT = 13, 9
SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]


def rle_of(mask: np.ndarray) -> dict:
    found = coco_mask.encode(np.asfortranarray(mask))
    return {"size": found["size"], "counts": found["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict:
    flat, runs, value = mask.flatten(order="F"), [], 0
    while len(flat):
        length = int(np.argmin(flat == value)) if (flat != value).any() else len(flat)
        runs.append(length)
        flat, value = flat[length:], 1 - value
    return {"size": list(mask.shape), "counts": runs}


def test_all_run_length_encodings_of_pycocotools_are_valid():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.3, 0.5, 0.99, 1):
        for height, width in ((9, 13), (1, 1), (1, 300), (640, 480)):
            mask = (rng.random((height, width)) < density).astype(np.uint8)
            assert segmentation_problem(rle_of(mask), width, height) is None
            if mask.size < 1000:
                assert segmentation_problem(uncompressed(mask), width, height) is None


def test_a_changed_run_length_encoding_is_found_unless_it_decodes_fully():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        mask = (rng.random((HEIGHT, WIDTH)) < 0.4).astype(np.uint8)
        rle = rle_of(mask)
        counts = list(rle["counts"])
        counts[rng.integers(len(counts))] = chr(rng.integers(48, 112))
        rle["counts"] = "".join(counts)
        if segmentation_problem(rle, WIDTH, HEIGHT):
            found += 1
        else:
            # pycocotools computes the area from the run lengths, without decoding.
            rest = coco_mask.decode(rle)
            assert coco_mask.area(rle) == rest.sum()
    assert found > 200


@pytest.mark.parametrize(
    "segmentation",
    [None, [], {}, [SQUARE], [SQUARE, SQUARE], [SQUARE, [1, 1, 2, 2]], [[-5, -5, 20, -5, 3, 30]]],
)
def test_segmentations_that_detectron2_supports_are_accepted(segmentation):
    assert segmentation_problem(segmentation, WIDTH, HEIGHT) is None


BAD = [
    ("x", "of type str"),
    (5, "of type int"),
    (SQUARE, "a flat list of 8 numbers"),
    ([SQUARE[:-1]], r"segmentation\[0\] with an odd number of coordinates \(7\)"),
    ([SQUARE, SQUARE[:-1]], r"segmentation\[1\] with an odd"),
    ([[1, 1, 5, 5]], "of 2 points; expected a polygon with at least three points"),
    ([[1, 1]], "of 1 points"),
    ([[]], "of 0 points"),
    ([SQUARE, "x"], r"segmentation\[1\] 'x'"),
    ([[1, 1, 5, "1", 5, 5]], "that contains 1;"),
    ([[1, 1, 5, None, 5, 5]], "that contains None"),
    ([[1, 1, 5, True, 5, 5]], "that contains True"),
    ([[1, 1, 5, float("nan"), 5, 5]], "that contains nan"),
    ([[1, 1, 5, float("inf"), 5, 5]], "that contains inf"),
    ([[1, 1, 5, -float("inf"), float("inf"), 5]], "that contains -inf"),
    ([[1, 1, 5, 10**400, 5, 5.5]], "that contains 1000"),
    ([[[1, 1], [5, 1], [5, 5]]], r"that contains \[1, 1\]"),
    ([[20, 1, 25, 1, 25, 5]], "which is outside its image of 13x9 pixels"),
    ([[1, -5, 5, -5, 5, -1]], "which is outside its image"),
    ({"size": [9, 13]}, "the keys"),
    ({"counts": [117]}, "the keys"),
    ({"size": [13, 9], "counts": [117]}, r"of size \[13, 9\], which is \[width, height\]"),
    ({"size": [9, 14], "counts": [126]}, r"of size \[9, 14\]; expected \[height, width\]"),
    ({"size": [9], "counts": [9]}, r"of size \[9\]"),
    ({"size": None, "counts": [9]}, "of size None"),
    ({"size": [9, 13], "counts": [50, 60]}, "whose runs add up to 110 pixels; .* 117 pixels"),
    ({"size": [9, 13], "counts": [50, -3, 70]}, "a run of -3 pixels"),
    ({"size": [9, 13], "counts": [5, 2, 18, 2, 31, 2, 44, 3]}, "pairs of start and length"),
    ({"size": [9, 13], "counts": [50.0, 67.0]}, "the counts"),
    ({"size": [9, 13], "counts": [[0, 50], [60, 5]]}, "the counts"),
    ({"size": [9, 13], "counts": None}, "the counts None"),
    ({"size": [9, 13], "counts": ""}, "the counts ''"),
    ({"size": [9, 13], "counts": "no rle!"}, "the counts 'no rle!'"),
    ({"size": [9, 13], "counts": "é"}, "the counts 'é'"),
    ({"size": [9, 13], "counts": "oooooooooooooooooooo0"}, "the counts 'ooo"),
    ({"size": [9, 13], "counts": "PPP"}, "the counts 'PPP'"),
    ({"size": [9, 13], "counts": "00"}, "whose runs add up to 0 pixels"),
]


@pytest.mark.parametrize(("segmentation", "message"), BAD)
def test_a_bad_segmentation_is_an_error_only_with_masks(segmentation, message, tmp_path):
    (tmp_path / "a.png").touch()
    image = {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}
    item = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    items = [
        {**item, "id": 5, "segmentation": [SQUARE]},
        {**item, "id": 6, "segmentation": segmentation},
    ]
    content = {
        "images": [image], "categories": [{"id": 1, "name": "x"}], "annotations": items,
    }  # fmt: skip
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    register_coco_dataset("mine", path, tmp_path)
    (record,) = DatasetCatalog.get("mine")
    assert [note["bbox"] for note in record["annotations"]] == [[1, 1, 4, 4]] * 2
    assert ["segmentation" in note for note in record["annotations"]] == [True, False]
    with pytest.raises(UserError, match=rf"annotations\[1\] \(id 6\) .*{message}") as caught:
        check_segmentations(["mine"])
    assert str(caught.value).startswith(f"{path}: ")
    assert "1 of 2 annotations" in str(caught.value)


@pytest.mark.parametrize("segmentation", [None, [], {}])
def test_a_missing_segmentation_is_named_with_masks(segmentation, data, files):
    for item in data["annotations"]:
        item["segmentation"] = [SQUARE]
    data["annotations"][1]["segmentation"] = segmentation
    register_coco_dataset("mine", *files(data), segmentations=True)
    with pytest.raises(UserError, match=r"annotations\[1\] \(id 2\) has no `segmentation`.*1 of 3"):
        check_segmentations(["mine"])


@pytest.mark.parametrize(("crowd", "found"), [(0, True), (1, False)])
def test_run_length_encodings_determine_the_mask_format(crowd, found, data, files):
    for item in data["annotations"]:
        item["segmentation"] = [SQUARE]
    rle = {"size": [48, 64], "counts": [100, 72, 2900]}
    data["annotations"][1] |= {"segmentation": rle, "iscrowd": crowd}
    register_coco_dataset("mine", *files(data))
    assert check_segmentations(["mine"]) is found
