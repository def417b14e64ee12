"""Tests for recipes that are generated for a user's dataset (`--data`)."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from senet_transfer import UserError, create_classifier, save_weights
from senet_transfer.config.load import load_config
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.own_data import DataPart, divide, find_parts
from senet_transfer.data.shapes.class_folders import make_shape_classes
from senet_transfer.engine.recipe import make
from senet_transfer.engine.recipe.facts import DataProperties, MachineProperties, describe_data
from senet_transfer.engine.recipe.rules import SCHEDULES, backbone, choose
from senet_transfer.engine.setup import RunOptions
from senet_transfer.engine.train import main
from tests.engine.conftest import SMALL

# COCO 2017: most images are 640 x 480, and a tenth of the objects are smaller than 15 pixels.
COCO = DataProperties("detection", 117_266, 80, 480, object_size=0.03, most_objects=93)
GPUS = MachineProperties(gpu_memory=80.0, processes=8, cpus=64)
CPU = MachineProperties(gpu_memory=0.0, processes=1, cpus=2)


def settings(data: DataProperties, machine: MachineProperties, weights: str) -> dict:
    return {choice.key: choice.value for choice in choose(data, machine, weights)}


def test_coco_on_eight_gpus_gets_detectron2s_recipe():
    found = settings(COCO, GPUS, "cadene/se_resnet50")
    # Detectron2's R50-FPN 1x uses 16 images per batch, a learning rate of 0.02 and 12 epochs.
    assert (found["SOLVER.IMS_PER_BATCH"], found["SOLVER.BASE_LR"]) == (16, 0.02)
    assert (found["INPUT.MIN_SIZE_TEST"], found["INPUT.MAX_SIZE_TEST"]) == (800, 1333)
    assert found["SOLVER.EPOCHS"] == 12
    assert "TEST.DETECTIONS_PER_IMAGE" not in found


def test_settings_depend_on_the_data_and_the_machine():
    few = replace(COCO, images=100, most_objects=150)
    found = settings(few, MachineProperties(8.0, 1, 4), "cadene/se_resnet50")
    # At 800 pixels, 8 GB is enough for 2 images. 12,000 samples are 120 epochs; the limit is 100.
    assert (found["SOLVER.IMS_PER_BATCH"], found["SOLVER.BASE_LR"]) == (2, 0.0025)
    assert (found["SOLVER.EPOCHS"], found["TEST.EVAL_EPOCHS"]) == (100, 10)
    assert found["TEST.DETECTIONS_PER_IMAGE"] == 200
    assert backbone(CPU)[0] == "se_resnet18"
    slow = settings(few, CPU, "")
    assert slow["_BASE_"] == "scratch_detector"
    assert (slow["MODEL.WEIGHTS"], slow["MODEL.BACKBONE.ARCH"]) == ("", "se_resnet18")
    assert (slow["INPUT.MIN_SIZE_TEST"], slow["SOLVER.EPOCHS"]) == (320, 60)
    assert slow["MODEL.ANCHOR_GENERATOR.SIZES"][0] == [16]
    flowers = DataProperties("classification", 900, 5, short_side=150)
    found = settings(flowers, CPU, "timm_legacy/seresnet18")
    assert found["_BASE_"] == "finetune_folder"
    crop, batch = found["INPUT.CLASSIFICATION.CROP"], found["SOLVER.IMS_PER_BATCH"]
    assert (crop, batch, found["SOLVER.EPOCHS"]) == (128, 32, 22)


@pytest.mark.parametrize(("task", "pretrained"), SCHEDULES)
def test_learning_rates_equal_those_of_the_base_configs(task, pretrained):
    found = settings(replace(COCO, task=task), CPU, "weights" if pretrained else "")
    cfg = load_config(found["_BASE_"])
    per_image = found["SOLVER.BASE_LR"] / found["SOLVER.IMS_PER_BATCH"]
    assert per_image == pytest.approx(cfg.SOLVER.REFERENCE_LR_PER_IMAGE)
    assert per_image == pytest.approx(cfg.SOLVER.BASE_LR / cfg.SOLVER.IMS_PER_BATCH)


def test_dataset_statistics_equal_a_count_by_hand(tmp_path):
    boxes = [(1, 1, [0, 0, 10, 10])] * 9 + [(1, 2, [0, 0, 90, 40]), (2, 2, [0, 0, 60, 60])]
    content = {
        "images": [
            {"id": number, "file_name": "a.jpg", "width": 200, "height": 100} for number in (1, 2)
        ] + [{"id": 3, "file_name": "a.jpg", "width": 80, "height": 90}],
        "categories": [{"id": 1, "name": "small"}, {"id": 2, "name": "large"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(boxes, 1)
        ],
    }  # fmt: skip
    (tmp_path / "a.jpg").touch()
    (tmp_path / "train.json").write_text(json.dumps(content))
    train, val = find_parts(str(tmp_path))
    assert (train, val) == (DataPart(str(tmp_path / "train.json"), str(tmp_path)), None)
    # The third image has no objects. Both classes have the same weight in the object size.
    assert describe_data(train, train) == DataProperties("detection", 2, 2, 100, 0.1, 10)


def test_boxes_without_a_size_are_rejected_as_in_training(tmp_path, caplog):
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 4, 0, 0], "area": 0, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [box],
    }
    (tmp_path / "a.jpg").touch()
    (tmp_path / "train.json").write_text(json.dumps(content))
    train, _ = find_parts(str(tmp_path))
    with pytest.raises(UserError, match="none of the 1 annotations can be used .*: 1 boxes"):
        describe_data(train, train)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train.json", "val.json"),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
    ],
)
def test_the_splits_of_detection_data_are_found_in_common_layouts(tmp_path, train, val):
    for name in (train, val):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"images": [{"file_name": "a.jpg"}]}')
        place = tmp_path / path.stem.removeprefix("instances_")
        images = path.parent if "_annotations" in name else place
        images.mkdir(exist_ok=True)
        (images / "a.jpg").touch()
    parts = find_parts(str(tmp_path))
    assert [part.path for part in parts] == [str(tmp_path / name) for name in (train, val)]
    assert all((tmp_path / part.image_dir / "a.jpg").is_file() for part in parts)


def test_splits_can_be_files_of_another_tool(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    value = {"x": 0, "y": 0, "width": 50, "height": 50, "rectanglelabels": ["cell"]}
    region = {"type": "rectanglelabels", "original_width": 8, "original_height": 8, "value": value}
    task = {"id": 1, "data": {"image": "a.jpg"}, "annotations": [{"result": [region]}]}
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps([task]))
    folder = str(tmp_path / "images")
    expected = [DataPart(str(tmp_path / f"{name}.json"), folder) for name in ("train", "val")]
    assert list(find_parts(str(tmp_path))) == expected


@pytest.mark.long
def test_pascal_voc_image_sets_are_the_splits(shared_data):
    bccd = shared_data / "bccd"
    parts = find_parts(str(bccd))
    images = str(bccd / "JPEGImages")
    assert parts == (DataPart(f"{bccd}:train", images), DataPart(f"{bccd}:val", images))
    found = describe_data(*parts)
    listed = (bccd / "ImageSets" / "Main" / "train.txt").read_text().split()
    assert (found.images, found.classes, found.short_side) == (len(listed), 3, 480)


def test_data_without_a_validation_split_is_split(shapes, tmp_path):
    names = {}
    content = json.loads((shapes / "annotations" / "instances_tiny.json").read_text())
    content |= {"classes": ["an entry", "of another program"], "info": {"version": 1}}
    (tmp_path / "whole.json").write_text(json.dumps(content))
    whole, none = find_parts(str(tmp_path / "whole.json"), image_dir=f"{shapes}/tiny")
    assert (whole.image_dir, none) == (f"{shapes}/tiny", None)
    for part in divide(whole, tmp_path / "boxes")[:2]:
        images = json.loads(Path(part.path).read_text())["images"]
        names[Path(part.path).name] = {image["file_name"] for image in images}
    assert len(names["val.json"]) == 2
    assert names["train.json"] | names["val.json"] == {p.name for p in (shapes / "tiny").iterdir()}
    classes = make_shape_classes(shapes, tmp_path / "classes")
    whole, none = find_parts(str(classes))
    assert (whole, none) == (DataPart(str(classes)), None)
    for _ in range(2):  # the second call replaces the split of the first
        train, val, _ = divide(whole, tmp_path / "labels")
    counts = [len(open_dataset(part.path)) for part in (train, val)]
    assert sum(counts) == len(open_dataset(classes))
    assert describe_data(train, val).images == counts[0] > counts[1] > 0


def test_entries_that_a_split_omits_are_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("senet_transfer"), "propagate", True)
    content = {}
    for number in range(4):
        shapes = [
            {"name": "rect", "x": 1, "y": 1, "width": 9, "height": 9},
            {"name": "point", "cx": 3, "cy": 4},
        ]
        regions = [{"shape_attributes": s, "region_attributes": {"class": "cell"}} for s in shapes]
        content[str(number)] = {"filename": f"{number}.png", "regions": regions}
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "via.json").write_text(json.dumps(content))
    whole, _ = find_parts(str(tmp_path / "via.json"))
    divide(whole, tmp_path / "split")
    note = "4 shapes of type point have no area and are skipped"
    assert f"{tmp_path / 'via.json'}: {note}." in caplog.messages


def test_unusable_data_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    for folder in ("flowers/train/a", "flowers/val/a", "boxes"):
        (tmp_path / folder).mkdir(parents=True)
    lost = tmp_path / "boxes" / "train.json"
    lost.write_text('{"images": [{"file_name": "a.jpg"}]}')
    with pytest.raises(UserError, match=r"a\.jpg is in none of the folders.*--images FOLDER"):
        find_parts(str(lost))
    with pytest.raises(UserError, match="same kind of data"):
        find_parts(str(tmp_path / "flowers"), str(lost), str(tmp_path))
    train, _ = find_parts(str(tmp_path / "flowers"))
    assert train == DataPart(str(tmp_path / "flowers" / "train"))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").touch()
    given = RunOptions(data=str(shards), options=("OUTPUT_DIR", str(tmp_path / "run")))
    with (
        pytest.raises(UserError, match="(?s)no validation data.*shards.*--val PATH"),
        make.use_recipe(given, resume=False),
    ):
        pass
    for given in ({"config_file": "finetune_folder"}, {"eval_only": True}):
        recipe = make.use_recipe(RunOptions(data="flowers", **given), resume=False)
        with pytest.raises(UserError, match="--data.*can't be combined with"), recipe:
            pass
    for given in (
        RunOptions(data="caf\udce9"),
        RunOptions(data="flowers", options=("OUTPUT_DIR", "caf\udce9")),
    ):
        recipe = make.use_recipe(given, resume=False)
        with pytest.raises(UserError, match=r"caf\\(xe9|udce9).* is not valid UTF-8"), recipe:
            pass


def test_without_a_connection_training_starts_from_random_weights(shapes, monkeypatch):
    def offline(name):
        raise UserError(f"Cannot download {name}")

    monkeypatch.setattr(make, "resolve", offline)
    train, val = find_parts(str(shapes))
    found = {choice.key: choice for choice in make.choose_settings(train, val, device="cpu")}
    assert found["_BASE_"].value == "scratch_detector"
    assert found["MODEL.WEIGHTS"].value == ""
    assert "can't be downloaded" in found["MODEL.WEIGHTS"].reason


def test_names_with_special_characters_are_written_to_the_recipe(shapes, tmp_path):
    data = tmp_path / "📷 Größe \\ud83d \u2028"
    shutil.copytree(shapes, data)
    options = ("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    with make.use_recipe(RunOptions(data=str(data), options=options), resume=False) as used:
        cfg = load_config(used.config_file)
        (tmp_path / "run").mkdir()
    assert cfg.DATASETS.REGISTER[0][2] == str(data / "train")


@pytest.mark.long
def test_the_backbone_matches_the_users_weights(shapes, tmp_path):
    path = tmp_path / "resnet18.pth"
    save_weights(create_classifier("resnet18"), path)
    options = ("MODEL.WEIGHTS", str(path), "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "a"))
    given = RunOptions(data=str(shapes), options=options)
    with make.use_recipe(given, resume=False) as used:
        cfg = load_config(used.config_file)
        (tmp_path / "a").mkdir()
    assert str(path) == cfg.MODEL.WEIGHTS
    assert (cfg.MODEL.BACKBONE.ARCH, cfg.MODEL.SE.ENABLED) == ("resnet18", False)


def train(**options):
    main(RunOptions(quiet=True, **options))


@pytest.mark.parametrize("task", ["detection", "classification"])
@pytest.mark.long
def test_the_saved_recipe_gives_the_same_run_bit_for_bit(task, shapes, tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    keys = {**SMALL, "SOLVER.MAX_ITER": "2", "SOLVER.STEPS": "(1,)", "OUTPUT_DIR": str(run)}
    keys |= {"MODEL.BACKBONE.ARCH": "", "INPUT.CLASSIFICATION.CROP": "64"}
    data = shapes
    if task == "classification":
        data = tmp_path / "classes"
        make_shape_classes(shapes, data / "train")
        shutil.copytree(data / "train", data / "val")
    for key in ("SOLVER.BASE_LR", "INPUT.MIN_SIZE_TRAIN", "MODEL.RESNETS.NORM"):
        keys.pop(key)
    train(data=str(data), options=tuple(word for pair in keys.items() for word in pair))
    text = (run / "recipe.yaml").read_text()
    assert "# set on the command line\n  MAX_ITER: 2" in text
    train(config_file=str(run / "recipe.yaml"), options=("OUTPUT_DIR", str(again)))
    saved = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (run, again)]
    assert saved[0]["model"].keys() == saved[1]["model"].keys()
    for name, tensor in saved[0]["model"].items():
        assert torch.equal(tensor, saved[1]["model"][name]), name
    if task == "classification":
        return
    # An earlier run and its recipe are not overwritten, and --resume uses the recipe.
    with pytest.raises(UserError, match="contains an earlier run"):
        train(data=str(data), options=("OUTPUT_DIR", str(run)))
    assert (run / "recipe.yaml").read_text() == text
    more = ("OUTPUT_DIR", str(run), "SOLVER.MAX_ITER", "3")
    train(data=str(data), options=more, resume=True)
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 2
