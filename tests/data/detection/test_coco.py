import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from pycocotools.coco import COCO

from senet_transfer.data.detection.coco import (
    register_coco_dataset,
    register_datasets,
    register_shapes,
)
from senet_transfer.data.detection.dataset_checks import check_datasets_on_disk, dataset_classes
from senet_transfer.data.shapes.generate import make_shapes
from senet_transfer.errors import UserError

pytestmark = pytest.mark.usefixtures("catalogs")


def test_a_registered_data_set_loads_as_in_detectron2(shared_data):
    json_file = shared_data / "coco128/annotations/instances_train2017.json"
    images = shared_data / "coco128/train2017"
    register_coco_dataset("mine", json_file, images)
    ours = DatasetCatalog.get("mine")
    assert ours == load_coco_json(str(json_file), str(images), "theirs")
    coco = COCO(json_file)
    assert len(ours) == len(coco.imgs) == 128
    assert sum(len(image["annotations"]) for image in ours) == len(coco.anns)
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == [c["name"] for c in coco.loadCats(sorted(coco.getCatIds()))]
    assert metadata.thing_classes == MetadataCatalog.get("coco_2017_val").thing_classes
    assert metadata.json_file == str(json_file)
    assert metadata.image_root == str(images)
    assert metadata.evaluator_type == "coco"
    summary = DatasetCatalog["mine"].summary
    assert summary.num_annotations == len(coco.getAnnIds())
    assert summary.num_crowd == len(coco.getAnnIds(iscrowd=True))
    assert summary.warnings == []


def test_metadata_follow_the_category_ids_and_are_known_before_loading(data, files):
    register_coco_dataset("mine", *files(data))
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 9: 1}
    loaded = {image["image_id"]: image for image in DatasetCatalog.get("mine")}
    assert [a["category_id"] for a in loaded[7]["annotations"]] == [1, 0]
    assert loaded[5]["annotations"] == []


def test_registering_twice_has_no_effect_and_reads_nothing(data, files, monkeypatch):
    register_coco_dataset("mine", *files(data))
    first = DatasetCatalog["mine"]
    monkeypatch.setattr("senet_transfer.data.detection.coco.read_coco_summary", None)
    register_coco_dataset("mine", first.json_file, first.image_dir)
    assert DatasetCatalog["mine"] is first


def test_the_same_name_with_another_path_replaces_the_registration(data, files):
    register_coco_dataset("mine", *files(data))
    held = MetadataCatalog.get("mine")
    data["categories"][0]["name"] = "wolf"
    other, images = files(data, "other.json")
    register_coco_dataset("mine", other, images)
    assert held is MetadataCatalog.get("mine")
    assert held.thing_classes == ["cat", "wolf"]
    assert held.json_file == str(other)
    assert len(DatasetCatalog.get("mine")) == 3


def test_an_invalid_file_keeps_the_earlier_registration(data, files):
    register_coco_dataset("mine", *files(data))
    broken, images = files({}, "broken.json")
    with pytest.raises(UserError, match="broken.json"):
        register_coco_dataset("mine", broken, images)
    assert len(DatasetCatalog.get("mine")) == 3
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "name", ["coco_2017_val", "voc_2007_train", "shapes_val", "theirs", "meta"]
)
def test_a_name_that_others_registered_is_rejected(name, data, files):
    register_shapes()
    path, images = files(data)
    register_coco_instances("theirs", {}, str(path), str(images))
    MetadataCatalog.get("meta").thing_classes = ["x"]
    before = dict(DatasetCatalog)
    with pytest.raises(UserError, match=f"'{name}' is already used.*Choose a different"):
        register_coco_dataset(name, path, images)
    assert dict(DatasetCatalog) == before


def test_a_name_with_only_empty_metadata_is_available(data, files):
    held = MetadataCatalog.get("mine")
    register_coco_dataset("mine", *files(data))
    assert held.thing_classes == ["cat", "dog"]


@pytest.mark.parametrize("name", ["", "  ", None])
def test_a_name_must_be_text(name, data, files):
    with pytest.raises(UserError, match="expected a non-empty string"):
        register_coco_dataset(name, *files(data))


def test_a_file_that_changes_is_read_again_in_the_same_process(data, files, annotation):
    path, _ = registered = files(data)
    register_coco_dataset("mine", *registered)
    assert dataset_classes("mine") == ["cat", "dog"]
    data["categories"].append({"id": 30, "name": "fox"})
    data["annotations"].append(annotation(4, 5, 30, [1, 1, 9, 9]))
    files(data)
    assert dataset_classes("mine") == ["cat", "dog", "fox"]
    assert sum(len(image["annotations"]) for image in DatasetCatalog.get("mine")) == 4

    # The file keeps its size, so only the modification time differs.
    content = json.dumps(data).replace("fox", "elk")
    path.write_text(content)
    os.utime(path, ns=(0, 1))
    DatasetCatalog.get("mine")
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog", "elk"]

    data["annotations"][0]["category_id"] = 1
    files(data)
    with pytest.raises(UserError, match=r"annotations\[0\]"):
        DatasetCatalog.get("mine")
    path.unlink()
    with pytest.raises(UserError, match="not found"):
        DatasetCatalog.get("mine")


def test_entries_register_with_home_and_variables_expanded(data, files, monkeypatch):
    path, images = files(data)
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("MY_DATA", str(path.parent))
    monkeypatch.chdir(path.parent)
    entries = [
        ["home", "~/train.json", "~/images"],
        ("variable", "$MY_DATA/train.json", "${MY_DATA}/images"),
        ["relative", "train.json", "images/"],
    ]
    assert register_datasets(entries) == ["home", "variable", "relative"]
    for name in ("home", "variable", "relative"):
        metadata = MetadataCatalog.get(name)
        assert (metadata.json_file, metadata.image_root) == (str(path), str(images))
    monkeypatch.chdir("/")
    assert len(DatasetCatalog.get("relative")) == 3
    assert register_datasets([]) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("mine", r"DATASETS.REGISTER is 'mine'; expected a list"),
        (None, r"DATASETS.REGISTER is None"),
        (["mine", "train.json", "images"], r"REGISTER\[0\] is 'mine'.*must also be in a list"),
        ([["mine"]], r"REGISTER\[0\] is \['mine'\]"),
        ([["mine", "train.json", "images", "x"]], r"REGISTER\[0\]"),
        ([["mine", "train.json", 3]], r"REGISTER\[0\]"),
        ([["mine", "", "images"]], r"REGISTER\[0\]"),
        ([{"name": "mine"}], r"REGISTER\[0\]"),
        ([["mine", "a.json", "images"], ["mine", "b.json", "images"]], "lists 'mine' twice"),
        ([["mine", "$UNSET_HERE/a.json", "images"]], r"variable \$UNSET_HERE is not set"),
    ],
)
def test_invalid_entries_are_rejected_with_the_expected_format(entries, message, monkeypatch):
    monkeypatch.delenv("UNSET_HERE", raising=False)
    with pytest.raises(UserError, match=message):
        register_datasets(entries)


@pytest.fixture
def shapes_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path / "shapes"


def test_shapes_have_metadata_before_they_are_created(shapes_root):
    register_shapes()
    register_shapes()
    for split in ("train", "val", "tiny"):
        metadata = MetadataCatalog.get(f"shapes_{split}")
        assert len(metadata.thing_classes) == 5
        assert metadata.json_file == str(shapes_root / f"annotations/instances_{split}.json")
        assert metadata.image_root == str(shapes_root / split)
        for ask in (DatasetCatalog.get, check_datasets_on_disk):
            with pytest.raises(UserError, match="senet data shapes"):
                ask(f"shapes_{split}")


@pytest.mark.long
def test_shapes_load_after_they_are_created(shapes_root):
    register_shapes()
    before = MetadataCatalog.get("shapes_tiny").as_dict()
    make_shapes(shapes_root, train=2, val=1)
    check_datasets_on_disk(["shapes_train", "shapes_val", "shapes_tiny"], evaluated=["shapes_val"])
    coco = COCO(shapes_root / "annotations/instances_tiny.json")
    loaded = DatasetCatalog.get("shapes_tiny")
    assert sum(len(image["annotations"]) for image in loaded) == len(coco.anns)
    # The classes that were registered before the file existed equal those in the file.
    assert MetadataCatalog.get("shapes_tiny").as_dict() == before


def test_an_existing_registration_of_shapes_is_kept(data, files, monkeypatch):
    path, images = files(data)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("shapes_train", None)
    register_coco_dataset("shapes_train", path, images)
    register_shapes()
    assert len(DatasetCatalog.get("shapes_train")) == 3
