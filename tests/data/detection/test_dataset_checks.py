import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin, register_coco_instances

from senet_transfer.data.detection.coco import register_coco_dataset, register_shapes
from senet_transfer.data.detection.dataset_checks import check_datasets_on_disk, dataset_classes
from senet_transfer.errors import UserError

pytestmark = pytest.mark.usefixtures("catalogs")


def test_classes_are_known_for_data_sets_of_every_kind(data, files, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_shapes()
    path, images = files(data)
    register_coco_dataset("mine", path, images)
    register_coco_instances("theirs", {}, str(path), str(images))
    assert dataset_classes(["mine", "theirs"]) == ["cat", "dog"]
    assert len(dataset_classes(("coco_2017_train", "coco_2017_val"))) == 80
    assert dataset_classes("keypoints_coco_2017_val") == ["person"]
    assert dataset_classes(["shapes_train", "shapes_val"])[0] == "circle"
    assert dataset_classes([]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c[0].update(name="wolf"),
            "class 1 is 'dog' in the first dataset and 'wolf' in the second dataset",
        ),
        (
            lambda c: c.append({"id": 99, "name": "x"}),
            "2 and 3 in total.*class 2 is missing in the first",
        ),
    ],
)
def test_data_sets_with_different_classes_are_rejected(change, message, data, files, annotation):
    register_coco_dataset("one", *files(data))
    change(data["categories"])
    data["annotations"] = [annotation(1, 7, 2, [1, 1, 9, 9])]
    register_coco_dataset("two", *files(data, "two.json"))
    with pytest.raises(UserError, match=f"'one' and 'two' have different classes.*{message}"):
        dataset_classes(["one", "two"])


def test_classes_in_another_order_are_mapped_or_rejected(data, files, annotation):
    register_coco_dataset("one", *files(data))
    data["categories"][0]["id"] = 1
    data["annotations"] = [annotation(1, 7, 1, [1, 1, 9, 9])]
    paths = files(data, "two.json")
    dogs = [item["name"] for item in data["categories"] if item["id"] == 1]
    register_coco_instances("theirs", {}, *map(str, paths))
    DatasetCatalog.get("theirs")
    message = "class 0 is 'cat' in the first dataset and 'dog' in the second dataset"
    with pytest.raises(UserError, match=f"'one' and 'theirs' have different classes.*{message}"):
        dataset_classes(["one", "theirs"])
    register_coco_dataset("two", *paths)
    assert dataset_classes("two") == ["dog", "cat"]
    assert dataset_classes(["one", "two"]) == ["cat", "dog"] == dataset_classes("two")
    ((item,), *_) = [record["annotations"] for record in DatasetCatalog.get("two") if
                     record["annotations"]]  # fmt: skip
    assert dataset_classes("two")[item["category_id"]] == dogs[0] == "dog"
    register_coco_dataset("two", *paths)  # as in a new run that lists this dataset first
    assert dataset_classes("two") == ["dog", "cat"]


def test_a_data_set_without_classes_is_rejected():
    DatasetCatalog.register("plain", lambda: [{}])
    with pytest.raises(UserError, match="'plain' has no class names.*'plain'.*thing_classes"):
        dataset_classes("plain")


def test_classes_in_missing_files_are_reported_as_missing_files(tmp_path):
    register_coco_instances("theirs", {}, str(tmp_path / "train.json"), str(tmp_path))
    with pytest.raises(UserError, match=r"train\.json \(missing\)"):
        dataset_classes("theirs")


@pytest.mark.parametrize("ask", [dataset_classes, check_datasets_on_disk])
def test_an_unknown_name_error_suggests_similar_names_and_registration(ask):
    with pytest.raises(UserError, match="'coco_2017_trian'. Did you mean 'coco_2017_train'") as e:
        ask(["coco_2017_trian"])
    assert "--dataset NAME JSON FOLDER" in str(e.value)
    assert "DATASETS.REGISTER" in str(e.value)
    with pytest.raises(UserError, match="Unknown dataset 'qqq'. Expected"):
        ask(["qqq"])


@pytest.fixture
def coco_root(tmp_path, monkeypatch):
    """Set the root of Detectron2's built-in COCO datasets, as ``$DETECTRON2_DATASETS`` does."""
    monkeypatch.setattr(builtin, "_root", str(tmp_path / "data"))
    for name in ("coco_2017_train", "coco_2017_val"):
        values = vars(MetadataCatalog.get(name))
        for key in ("json_file", "image_root"):
            values[key] = str(tmp_path / "data" / os.path.relpath(values[key], "datasets"))
    return tmp_path / "data"


def test_missing_coco_files_are_listed_with_their_path_and_source(coco_root):
    with pytest.raises(UserError) as caught:
        check_datasets_on_disk(["coco_2017_train", "coco_2017_val"])
    message = str(caught.value)
    assert f"{coco_root}/coco/annotations/instances_train2017.json (missing)" in message
    assert f"{coco_root}/coco/val2017/ (missing)" in message
    for part in ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip", "cocodataset.org"):
        assert part in message
    assert f"Expected under {coco_root} ($DETECTRON2_DATASETS" in message
    assert "make demo" in message
    assert "--config-file configs/finetune_detector.yaml" in message
    assert "--dataset my_train train.json images/" in message
    assert "--dataset my_val val.json images/" in message


def test_only_missing_files_are_listed(coco_root, data):
    (coco_root / "coco/annotations").mkdir(parents=True)
    (coco_root / "coco/val2017").mkdir()
    json_file = coco_root / "coco/annotations/instances_val2017.json"
    json_file.write_text(json.dumps(data)[:-5])
    with pytest.raises(UserError) as caught:
        check_datasets_on_disk("coco_2017_val")
    assert "instances_val2017.json is truncated" in str(caught.value)
    assert "val2017/ (empty)" in str(caught.value)
    assert "(missing)" not in str(caught.value)
    json_file.write_text(json.dumps(data))
    (coco_root / "coco/val2017/a.jpg").touch()
    check_datasets_on_disk("coco_2017_val")


def test_missing_files_of_other_builtin_data_sets_are_listed(monkeypatch, tmp_path):
    vars(MetadataCatalog.get("voc_2007_val"))["dirname"] = str(tmp_path / "VOC2007")
    with pytest.raises(UserError, match="VOC2007/ .missing."):
        check_datasets_on_disk(["voc_2007_val"])


def test_registered_data_passes_and_is_checked_again(data, files):
    path, images = files(data)
    register_coco_dataset("mine", path, images)
    check_datasets_on_disk(["mine"], evaluated=["mine"])
    path.unlink()
    with pytest.raises(UserError, match="not found"):
        check_datasets_on_disk(["mine"])


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_a_file_that_coco_metrics_cannot_read_is_only_for_training(key, data, files):
    del data["annotations"][0][key]
    register_coco_dataset("mine", *files(data))
    check_datasets_on_disk(["mine"])
    with pytest.raises(UserError, match="1 of 3 annotations .*DATASETS.TEST"):
        check_datasets_on_disk(["mine"], evaluated=["mine"])
