"""What a run refuses or says before it starts."""

import json
import logging

import pytest

from senet_transfer import UserError
from senet_transfer.engine.setup import load_config, setup

FROZEN = {"MODEL.RESNETS.NORM": "FrozenBN"}


@pytest.mark.parametrize(
    ("flags", "overrides", "words"),
    [
        ((), FROZEN, "FrozenBN and MODEL.WEIGHTS is empty.*NORM GN"),
        (("--resume",), {}, "nothing to resume.*OUTPUT_DIR"),
        (("--eval-only",), {}, "random weights"),
        ((), {"MODEL.WEIGHTS": "no/such.pth"}, "MODEL.WEIGHTS is no/such.pth.*no such file"),
        ((), {"DATASETS.TRAIN": "('owm',)"}, "owm.*--dataset"),
        ((), {"MODEL.META_ARCHITECTURE": "RetinaNet", "TEST.AUG.ENABLED": "True"}, "augmentation"),
        ((), {"MODEL.SE.RATIOS": "8"}, "MODEL.SE.RATIO"),
        ((), {"MODEL.SE.RATIO": "eight"}, "RATIO"),
    ],
)
def test_a_run_that_could_only_waste_time_is_refused_with_the_remedy(
    command, flags, overrides, words
):
    with pytest.raises(UserError, match=f"(?s){words}"):
        setup(command(*flags, **overrides))


def test_coco_that_is_not_on_disk_is_answered_with_layout_source_and_commands(
    command, monkeypatch, tmp_path
):
    args = command(**{"DATASETS.TRAIN": "('coco_2017_train',)"})
    with pytest.raises(UserError) as error:
        setup(args)
    message = str(error.value)
    for word in (
        "annotations/instances_train2017.json",
        "train2017",
        "cocodataset.org",
        "make demo",
        "--dataset",
    ):
        assert word in message


def test_a_missing_config_file_is_named():
    with pytest.raises(UserError, match="no/such.yaml"):
        load_config("no/such.yaml")


def test_a_config_file_that_is_not_yaml_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("MODEL: [1,")
    with pytest.raises(UserError, match="broken.yaml is not YAML"):
        load_config(str(path))


def test_classes_and_their_number_come_from_the_json(command, shapes):
    cfg = setup(command())
    data = json.loads((shapes / "annotations" / "instances_tiny.json").read_text())
    names = [category["name"] for category in data["categories"]]
    assert list(cfg.DATASETS.CLASSES) == names
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == len(names)


def test_the_output_folder_tells_what_ran(command, tmp_path):
    cfg = setup(command())
    run = tmp_path / "run"
    saved = load_config(str(run / "config.yaml"))
    cfg.defrost()
    for config in (saved, cfg):
        # Tuples within a tuple, which YAML gives back as lists.
        config.MODEL.pop("ROI_BOX_CASCADE_HEAD")
    assert saved == cfg
    environment = (run / "environment.txt").read_text()
    assert "torch==" in environment
    assert "detectron2" in environment


def test_an_output_folder_that_cannot_be_made_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        setup(command(OUTPUT_DIR=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(("rate", "warned"), [("0.02", True), ("0.0025", False)])
def test_a_rate_that_is_not_scaled_to_the_batch_is_warned_of(command, caplog, rate, warned):
    logging.getLogger("senet_transfer").propagate = True
    with caplog.at_level(logging.WARNING):
        setup(command(**{"SOLVER.BASE_LR": rate}))
    assert any("linear rule" in record.message for record in caplog.records) == warned


def test_frozen_stages_of_random_weights_are_warned_of(command, caplog):
    logging.getLogger("senet_transfer").propagate = True
    with caplog.at_level(logging.WARNING):
        setup(command(**{"MODEL.BACKBONE.FREEZE_AT": "2"}))
    assert any("keep their random weights" in record.message for record in caplog.records)
