"""Tests for class names in checkpoints, and for their comparison with the dataset's class names."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from senet_transfer import UserError
from senet_transfer.config.load import load_config
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from senet_transfer.weights.convert import write_converted
from senet_transfer.weights.mapping.source import examine

OWN = ["person", "cup", "chair"]


@pytest.fixture
def cases(shared_data) -> Path:
    return shared_data.parent / "cases" / "detection"


@pytest.fixture
def run(cases, command, tmp_path, zero_initial_weights):
    """Return a function that sets up a run, and the path of a checkpoint.

    The run trains on the dataset ``base`` and evaluates on the annotation file passed to the
    function. The checkpoint contains the class names of ``base``.
    """
    base = ("--dataset", "base", str(cases / "base/train.json"), str(cases / "base/images"))

    def make(val: Path, *flags: str, **overrides: str):
        val_set = ("--dataset", "val", str(val), str(cases / "base_val/images"))
        keys = {"DATASETS.TRAIN": "('base',)", "DATASETS.TEST": "('val',)", **overrides}
        return setup(command(*base, *val_set, *flags, **keys))

    cfg = make(cases / "base_val/val.json")
    model = Trainer.build_model(cfg)
    folder = tmp_path / "earlier"
    folder.mkdir()
    Checkpointer(model, str(folder), classes=cfg.DATASETS.CLASSES).save("model_final")
    return make, folder / "model_final.pth"


def perfect(val: Path) -> list[tuple[dict, dict]]:
    """Return the input and output of a detector for each image, with one detection per object.

    The boxes are slightly larger than the ground truth. The classes are correct; their indices are
    positions in ``OWN``.
    """
    truth = json.loads(val.read_text())
    names = {item["id"]: item["name"] for item in truth["categories"]}
    found = []
    for image in truth["images"]:
        own = [item for item in truth["annotations"] if item["image_id"] == image["id"]]
        boxes = torch.tensor([item["bbox"] for item in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2] + 3
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.linspace(0.9, 0.5, len(own))
        labels = [OWN.index(names[item["category_id"]]) for item in own]
        instances.pred_classes = torch.tensor(labels)
        found.append(({"image_id": image["id"]}, {"instances": instances}))
    return found


def metrics(cfg, val: Path) -> dict:
    evaluator = Trainer.build_evaluator(cfg, "val")
    evaluator.reset()
    for given, output in perfect(val):
        evaluator.process([given], [output])
    return evaluator.evaluate()["bbox"]


def labels(name: str) -> list[list[int]]:
    return [[item["category_id"] for item in record["annotations"]] for record in
            DatasetCatalog.get(name)]  # fmt: skip


@pytest.mark.long
def test_a_model_is_evaluated_with_its_own_order_of_classes(run, cases, caplog):
    make, weights = run
    plain, alpha = cases / "base_val/val.json", cases / "val_alpha/val.json"
    options = {"MODEL.WEIGHTS": str(weights)}
    cfg = make(plain, "--eval-only", **options)
    expected, truth = metrics(cfg, plain), labels("val")
    assert expected["AP"] > 30
    assert not any("a different order" in message for message in caplog.messages)
    with caplog.at_level(logging.WARNING):
        cfg = make(alpha, "--eval-only", **options)
    assert any("in a different order" in message for message in caplog.messages)
    assert cfg.DATASETS.CLASSES == OWN
    assert cfg.DATASETS.CATEGORY_IDS == [3, 2, 1]
    assert repr(metrics(cfg, plain)) == repr(expected)
    assert labels("val") == truth
    written = json.loads(
        Path(cfg.OUTPUT_DIR, "inference", "val", "coco_instances_results.json").read_text()
    )
    ids = {OWN[0]: 3, OWN[1]: 2, OWN[2]: 1}
    expected_ids = [
        ids[OWN[label]] for _, out in perfect(plain) for label in out["instances"].pred_classes
    ]
    assert [row["category_id"] for row in written] == expected_ids

    # A run that only validates on the file uses the class order of its training data.
    cfg = make(alpha)
    assert cfg.DATASETS.CLASSES == OWN
    assert repr(metrics(cfg, plain)) == repr(expected)
    # A run that trains on the file, without the weights, uses the file's class order.
    own = {"DATASETS.TRAIN": "('val',)"}
    assert sorted(OWN) == make(alpha, **own).DATASETS.CLASSES
    # A new run that starts from the weights uses the class order of the weights.
    assert make(alpha, **own, **options).DATASETS.CLASSES == OWN


@pytest.mark.long
def test_a_run_is_resumed_with_its_own_order_of_classes_or_rejected(run, cases, tmp_path):
    make, weights = run
    folder = {"OUTPUT_DIR": str(weights.parent), "DATASETS.TRAIN": "('val',)"}
    (weights.parent / "last_checkpoint").write_text(weights.name)
    cfg = make(cases / "val_alpha/val.json", "--resume", **folder)
    assert cfg.DATASETS.CLASSES == OWN
    other = renamed(cases / "val_alpha/val.json", tmp_path)
    with pytest.raises(UserError) as error:
        make(other, "--resume", **folder)
    assert "['person', 'cup', 'chair']" in str(error.value)
    assert "['chair', 'mug', 'person']" in str(error.value)
    assert "'cup' is missing" in str(error.value)


def renamed(file: Path, folder: Path) -> Path:
    data = json.loads(file.read_text())
    for item in data["categories"]:
        item["name"] = item["name"].replace("cup", "mug")
    path = folder / "renamed.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.long
def test_a_model_is_not_evaluated_on_other_classes(run, cases, tmp_path, caplog):
    make, weights = run
    other = renamed(cases / "base_val/val.json", tmp_path)
    options = {"MODEL.WEIGHTS": str(weights), "DATASETS.TRAIN": "('val',)"}
    with pytest.raises(
        UserError, match=r"(?s)classes that differ.*\['person', 'cup', 'chair'\].*'mug'"
    ):
        make(other, "--eval-only", **options)
    with caplog.at_level(logging.WARNING):
        assert make(other, **options).DATASETS.CLASSES == ["person", "mug", "chair"]
    assert any("predict classes are loaded from" in message for message in caplog.messages)


@pytest.mark.long
def test_checkpoints_without_class_names_have_those_of_the_config_next_to_them(
    run, cases, tmp_path
):
    make, weights = run
    saved = torch.load(weights, weights_only=True)
    assert saved["senet_transfer"].pop("classes") == OWN
    old = tmp_path / "old" / "model_final.pth"
    old.parent.mkdir()
    torch.save(saved, old)
    alpha, options = cases / "val_alpha/val.json", {"MODEL.WEIGHTS": str(old)}
    assert sorted(OWN) == make(alpha, "--eval-only", **options).DATASETS.CLASSES
    cfg = load_config("configs/faster_rcnn_se_r50.yaml", ["DATASETS.CLASSES", str(OWN)])
    (old.parent / "config.yaml").write_text(cfg.dump())
    assert make(alpha, "--eval-only", **options).DATASETS.CLASSES == OWN


@pytest.mark.long
def test_converted_models_keep_the_class_names(run, tmp_path):
    _, weights = run
    write_converted(examine(weights), tmp_path / "converted.safetensors", "senet_transfer")
    assert examine(tmp_path / "converted.safetensors").classes == tuple(OWN)
    saved = torch.load(weights, weights_only=True)
    saved["senet_transfer"]["classes"] = [1, 2]
    torch.save(saved, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="invalid class names"):
        examine(tmp_path / "wrong.pth")


@pytest.mark.long
def test_predictions_have_the_class_names_of_the_checkpoint(run, cases, tmp_path):
    make, weights = run
    # Write the config of a run with the same classes in a different order.
    cfg = copy.deepcopy(make(cases / "val_alpha/val.json", **{"DATASETS.TRAIN": "('val',)"}))
    assert sorted(OWN) == cfg.DATASETS.CLASSES
    path = tmp_path / "recipe.yaml"
    path.write_text(cfg.dump())
    loaded = load_trained(str(weights), str(path))
    assert loaded.classes == OWN
    assert loaded.cfg.DATASETS.CATEGORY_IDS == [3, 2, 1]
