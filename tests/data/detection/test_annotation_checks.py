import json
import logging
import re
import time

import pytest
from detectron2.data import DatasetCatalog

from senet_transfer.data.detection.coco import CocoDataset, register_coco_dataset
from senet_transfer.data.detection.dataset_checks import check_trainable
from senet_transfer.errors import UserError

REMOVED = object()

pytestmark = pytest.mark.usefixtures("catalogs")


def spoil(data, path, value):
    """Set the JSON value at a path such as "images.0.width".

    If ``value`` is REMOVED, delete the last key of the path instead.
    """
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        data = data[part]
    if value is REMOVED:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains an empty file"),
        (" \n", "contains an empty file"),
        ("<!DOCTYPE html><html>404</html>", "HTML"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ("PK\x03\x04rest", "zip archive"),
        ("a,b\n1,2", "begins with b'a,b"),
        ("[]", "contains a list"),
        ("{", "truncated"),
        ('{"images": [{"id": 1}', "truncated"),
        ('{"images": [1, 2', "truncated"),
        ("{'images': []}", "is not valid JSON"),
        ('{"images": [}}', "is not valid JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "Cannot read .* as JSON"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_named_and_described(content, message, files):
    path, images = files(content)
    with pytest.raises(UserError, match=message) as caught:
        register_coco_dataset("mine", path, images)
    assert str(path) in str(caught.value)
    assert "mine" not in DatasetCatalog


def test_a_file_truncated_anywhere_is_rejected(data, files):
    whole = json.dumps(data)
    for end in range(0, len(whole) - 1, 7):
        with pytest.raises(UserError, match="truncated|empty file"):
            register_coco_dataset("mine", *files(whole[:end]))


def test_text_that_is_not_utf8_is_rejected(data, files):
    path, images = files(data)
    path.write_bytes(json.dumps(data, ensure_ascii=False).replace("cat", "k\xe4t").encode("cp1252"))
    with pytest.raises(UserError, match="encoded as UTF-8"):
        register_coco_dataset("mine", path, images)


def test_missing_paths_are_named(data, files, tmp_path):
    path, images = files(data)
    with pytest.raises(UserError, match=r"not found: .*nowhere\.json"):
        register_coco_dataset("mine", tmp_path / "nowhere.json", images)
    with pytest.raises(UserError, match="Image folder .*nowhere does not exist"):
        register_coco_dataset("mine", path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="swapped"):
        register_coco_dataset("mine", images, path)
    with pytest.raises(UserError, match="is a folder"):
        register_coco_dataset("mine", tmp_path, images)


@pytest.mark.parametrize("key", ["images", "categories", "annotations"])
@pytest.mark.parametrize("value", [REMOVED, [], {}, None, "x"])
def test_each_section_must_be_a_non_empty_list(key, value, data, files):
    spoil(data, key, value)
    path, images = files(data)
    with pytest.raises(UserError, match=f"`{key}`") as caught:
        register_coco_dataset("mine", path, images)
    assert str(path) in str(caught.value)


BAD_ENTRIES = [
    ("images.1", 5, r"images\[1\] is not a JSON object"),
    ("images.1.id", REMOVED, r"images\[1\] has no `id`"),
    ("images.1.id", "3", r"images\[1\] \(id '3'\) has id '3'"),
    ("images.1.id", [3], r"images\[1\] .*whole number"),
    ("images.1.id", 7, r"images\[1\] \(id 7\) has the same id as images\[0\]"),
    ("images.1.file_name", REMOVED, r"images\[1\] \(id 3\) has no `file_name`"),
    ("images.1.file_name", "", r"images\[1\] \(id 3\) has file_name ''"),
    ("images.1.file_name", ["b.png"], r"has file_name \['b.png'\]"),
    ("images.1.file_name", 4, r"images\[1\] \(id 3\) has file_name 4"),
    ("images.1.file_name", "../b.png", "a path inside the image folder"),
    ("images.1.file_name", "sub/../../b.png", "a path inside the image folder"),
    ("images.1.file_name", "sub\\..\\b.png", "a path inside the image folder"),
    ("images.1.file_name", "/etc/passwd", "a path inside the image folder"),
    ("images.1.width", REMOVED, r"images\[1\] \(id 3\) has no `width`"),
    ("images.1.width", 0, "has width 0"),
    ("images.1.height", -4, "has height -4"),
    ("images.1.height", 40.5, "has height 40.5"),
    ("images.1.height", "40", "has height '40'"),
    ("images.1.height", True, "has height True"),
    ("categories.1", None, r"categories\[1\] is not a JSON object"),
    ("categories.1.id", REMOVED, r"categories\[1\] has no `id`"),
    ("categories.1.id", "2", r"categories\[1\] .* has id '2'"),
    ("categories.1.id", 9, r"categories\[1\] \(id 9\) has the same id as categories\[0\]"),
    ("categories.1.name", REMOVED, r"categories\[1\] \(id 2\) has no `name`"),
    ("categories.1.name", " ", r"categories\[1\] \(id 2\) has name ' '"),
    ("categories.1.name", "dog", r"categories\[1\] .* has the same name 'dog' as categories\[0\]"),
    ("annotations.1", [], r"annotations\[1\] is not a JSON object"),
    ("annotations.1.id", REMOVED, r"annotations\[1\] has no `id`"),
    ("annotations.1.id", "2", r"annotations\[1\] .* has id '2'"),
    ("annotations.1.id", 1, r"annotations\[1\] \(id 1\) has the same id as annotations\[0\]"),
    ("annotations.1.image_id", REMOVED, "has no `image_id`"),
    ("annotations.1.image_id", 8, r"has image_id 8, which is not in `images`.*\[7, 3, 5\]"),
    ("annotations.1.image_id", "7", r"has image_id '7'.*of type int"),
    ("annotations.1.image_id", [7], r"has image_id \[7\]"),
    ("annotations.1.category_id", REMOVED, "has no `category_id`"),
    ("annotations.1.category_id", 0, "has category_id 0, which is not in `categories`"),
    ("annotations.1.category_id", {}, "has category_id {}"),
    ("annotations.1.bbox", REMOVED, r"annotations\[1\] \(id 2\) has no `bbox`"),
    ("annotations.1.bbox", None, "four finite numbers"),
    ("annotations.1.bbox", [], "four finite numbers"),
    ("annotations.1.bbox", [1, 2, 3], "four finite numbers"),
    ("annotations.1.bbox", [1, 2, 3, 4, 5], "four finite numbers"),
    ("annotations.1.bbox", ["1", "2", "3", "4"], "four finite numbers"),
    ("annotations.1.bbox", "1234", "four finite numbers"),
    ("annotations.1.bbox", {"x": 1, "y": 2, "w": 3, "h": 4}, "four finite numbers"),
    ("annotations.1.bbox", [1, 2, None, 4], "four finite numbers"),
    ("annotations.1.bbox", [float("nan"), 2, 3, 4], "four finite numbers"),
    ("annotations.1.bbox", [1, 2, float("inf"), 4], "four finite numbers"),
    ("annotations.1.bbox", [1, float("-inf"), 3, 4], "four finite numbers"),
    ("annotations.1.bbox", [1, 2, -3, 4], "with a negative size"),
    ("annotations.1.bbox", [1, 2, 3, -0.5], "with a negative size"),
    ("annotations.1.bbox", [64, 2, 3, 4], "outside its image of 64x48 pixels"),
    ("annotations.1.bbox", [1, 48.5, 3, 4], "outside its image"),
    ("annotations.1.bbox", [-4, 2, 4, 4], "outside its image"),
    ("annotations.1.bbox", [1, -9, 3, 4], "outside its image"),
    ("annotations.1.bbox", [10**400, 2, 3, 4], "outside its image"),
    ("annotations.1.area", float("nan"), "has area nan.*a finite number, the area"),
    ("annotations.1.area", float("inf"), "has area inf"),
    ("annotations.1.area", "12", "has area '12'"),
    ("annotations.1.ignore", 1, "has `ignore` 1"),
    ("annotations.1.iscrowd", "0", "has iscrowd '0'"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_ENTRIES)
def test_a_bad_entry_is_rejected_and_named(path, value, message, data, files):
    spoil(data, path, value)
    json_file, images = files(data)
    with pytest.raises(UserError, match=message) as caught:
        register_coco_dataset("mine", json_file, images)
    assert str(caught.value).startswith(f"{json_file}: {path.split('.')[0]}[1]")
    assert "expected" in str(caught.value)
    assert "mine" not in DatasetCatalog


def test_boxes_as_fractions_of_the_image_are_rejected(data, files):
    for item in data["annotations"]:
        item["bbox"] = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(UserError, match="not fractions"):
        register_coco_dataset("mine", *files(data))


def test_a_byte_order_mark_is_skipped(data, files):
    path, images = files("\ufeff" + json.dumps(data))
    register_coco_dataset("mine", path, images)
    assert sum(len(image["annotations"]) for image in DatasetCatalog.get("mine")) == 3


def test_boxes_that_are_all_zero_are_rejected(data, files):
    for item in data["annotations"]:
        item["bbox"] = [0, 0, 0, 0]
    with pytest.raises(UserError, match=r"all 3 boxes are \[0, 0, 0, 0\]"):
        register_coco_dataset("mine", *files(data))


def test_a_file_without_training_objects_is_rejected_for_training(data, files):
    boxes = [3, 3, 0, 5], [4, 4, 5, 0], [1, 1, 9, 9]
    for item, box in zip(data["annotations"], boxes, strict=True):
        item["bbox"] = box
    register_coco_dataset("mine", *files(data))
    with pytest.raises(UserError, match="none of the 3 annotations.*2 boxes.*1 annotations have"):
        check_trainable(["mine"])
    data["annotations"][0]["bbox"] = [3, 3, 4, 5]
    register_coco_dataset("other", *files(data, "other.json"))
    check_trainable(["mine", "other"])


@pytest.mark.parametrize("area", [0, 1, 1.0, 0.02, 1e6])
def test_areas_that_contradict_the_boxes_are_a_warning(area, data, files, caplog):
    for item in data["annotations"]:
        item["area"] = area
    with caplog.at_level(logging.WARNING):
        register_coco_dataset("mine", *files(data))
    (said,) = caplog.messages
    assert "the `area` of 3 of 3 annotations does not match their box" in said


def test_crowds_in_the_majority_are_a_warning(data, files, caplog):
    data["annotations"][1]["iscrowd"] = 1
    with caplog.at_level(logging.WARNING):
        register_coco_dataset("mine", *files(data))
    (said,) = caplog.messages
    assert "2 of 3 annotations have iscrowd=1; training ignores them" in said


def test_a_file_with_only_crowds_is_rejected(data, files):
    for item in data["annotations"]:
        item["iscrowd"] = 1
    with pytest.raises(UserError, match="all 3 annotations have iscrowd=1"):
        register_coco_dataset("mine", *files(data))


@pytest.mark.parametrize("value", [REMOVED, []])
def test_a_test_set_without_ground_truth_registers_on_request(value, data, files):
    spoil(data, "annotations", value)
    path, images = files(data)
    with pytest.raises(UserError, match="allow_empty=True"):
        register_coco_dataset("mine", path, images)
    register_coco_dataset("mine", path, images, allow_empty=True)
    assert len(DatasetCatalog.get("mine")) == 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("annotations.1.bbox", [10, 10, 0, 5], "1 of 3 boxes have zero width or height"),
        ("annotations.1.bbox", [64, 48, 0, 0], "1 of 3 boxes have zero width or height"),
        ("annotations.1.bbox", [10, 10, 60, 5], r"extend beyond their image.*\[x1, y1, x2"),
        ("annotations.1.area", REMOVED, "1 of 3 annotations have no `area` or no `iscrowd`"),
        ("annotations.1.iscrowd", REMOVED, "1 of 3 annotations have no `area` or no `iscrowd`"),
        ("annotations.1.area", None, "1 of 3 annotations have no `area` or no `iscrowd`"),
        ("annotations.1.iscrowd", None, "1 of 3 annotations have no `area` or no `iscrowd`"),
        ("categories.1.name", "Dog", "'dog' and 'Dog' differ only in spaces or upper and lower"),
        ("categories.1.name", "dog ", "'dog' and 'dog ' differ only in spaces or upper and lower"),
    ],
)
def test_unusual_entries_are_counted_in_a_warning(path, value, message, data, files, caplog):
    spoil(data, path, value)
    json_file, images = files(data)
    with caplog.at_level(logging.WARNING):
        register_coco_dataset("mine", json_file, images)
    (said,) = caplog.messages
    assert re.search(message, said)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        register_coco_dataset("mine", json_file, images)
    assert not caplog.records  # the warning is logged only once
    assert len(DatasetCatalog.get("mine")) == 3


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("annotations.1.bbox", [-0.5, -0.5, 64.6, 48.5]),  # annotation tools round coordinates
        ("annotations.1.id", 0),  # the evaluator renumbers annotations from 1
        ("annotations.1.iscrowd", False),
        ("annotations.1.ignore", 0),
        ("annotations.1.ignore", None),
        ("annotations.1.ignore", False),
        ("annotations.1.segmentation", []),
        ("annotations.1.segmentation", None),
        ("annotations.1.segmentation", [[1, 2, 3, 4, 5, 6]]),
        ("annotations.1.segmentation", {"counts": [3072], "size": [48, 64]}),
        # Invalid segmentations are accepted when only boxes are used.
        ("annotations.1.segmentation", "x"),
        ("annotations.1.segmentation", [1, 2, 3, 4, 5, 6]),
        ("annotations.1.segmentation", {"counts": [1]}),
        ("images.2.file_name", "sub/./c.png"),
        ("info", None),
    ],
)
def test_valid_unusual_entries_register_without_a_warning(path, value, data, files):
    spoil(data, path, value)
    register_coco_dataset("mine", *files(data))
    assert DatasetCatalog["mine"].summary.warnings == []
    assert len(DatasetCatalog.get("mine")) == 3


def test_a_name_with_dots_stays_inside_the_folder(data, files):
    _, images = files(data)
    (images / "b.png").rename(images / "b..2.png")
    data["images"][1]["file_name"] = "b..2.png"
    path = images.parent / "dots.json"
    path.write_text(json.dumps(data))
    register_coco_dataset("mine", path, images)


def test_missing_images_are_counted(data, files):
    path, images = files(data)
    (images / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 3 images listed .* for example b\.png"):
        register_coco_dataset("mine", path, images)
    with pytest.raises(
        UserError, match=r"3 of the 3 images.* for example a\.png, b\.png, sub/c\.png"
    ):
        register_coco_dataset("mine", path, path.parent)


@pytest.mark.parametrize("prefix", ["images/", "images\\"])
def test_a_folder_repeated_in_the_file_names_is_reported(prefix, data, files):
    for image in data["images"][:1]:
        image["file_name"] = prefix + image["file_name"]
    with pytest.raises(UserError, match=r"contains a\.png, so .* is wrong"):
        register_coco_dataset("mine", *files(data))


@pytest.mark.long
def test_checking_costs_a_fraction_of_parsing(shared_data, tmp_path):
    source = shared_data / "coco128/annotations/instances_train2017.json"
    content = json.loads(source.read_text())
    annotations = content["annotations"]
    content["annotations"] = [
        {**item, "id": number} for number, item in enumerate(annotations * 4, start=1)
    ]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(content))
    seconds = {"parse": [], "read": []}
    dataset = CocoDataset("mine", str(path), str(shared_data / "coco128/train2017"))
    for _ in range(3):
        start = time.process_time()
        with open(path) as file:
            json.load(file)
        middle = time.process_time()
        dataset._state = None
        dataset.refresh()
        seconds["parse"].append(middle - start)
        seconds["read"].append(time.process_time() - middle)
    assert min(seconds["read"]) < 2 * min(seconds["parse"])
