"""Tests for checks, errors and warnings before a run starts."""

import json
import logging
from dataclasses import FrozenInstanceError, replace

import pytest

from senet_transfer import UserError
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.config.load import load_config
from senet_transfer.engine.setup import RunOptions, resumes, setup, use_named_datasets
from senet_transfer.engine.trainer import Trainer
from senet_transfer.weights.hub import download
from senet_transfer.weights.hub.catalogue import catalogue_entry, load_catalogue
from tests.engine.conftest import SMALL

FROZEN = {"MODEL.RESNETS.NORM": "FrozenBN"}
SCRATCH = r"configs/scratch_detector\.yaml"


@pytest.mark.parametrize(
    ("flags", "overrides", "words"),
    [
        ((), FROZEN, f"FrozenBN and MODEL.WEIGHTS is empty.*{SCRATCH}.*NORM to GN"),
        (("--resume",), {}, "nothing to resume.*OUTPUT_DIR"),
        (("--eval-only",), {}, "random weights"),
        ((), {"MODEL.WEIGHTS": "no/such.pth"}, f"no/such.pth, but .* not exist.*{SCRATCH}"),
        ((), {"DATASETS.TRAIN": "('owm',)"}, "owm.*--dataset"),
        ((), {"MODEL.KEYPOINT_ON": "True", "TEST.AUG.ENABLED": "True"}, "keypoints"),
        ((), {"MODEL.SE.RATIOS": "8"}, "Did you mean MODEL.SE.RATIO or"),
        ((), {"MODEL.BACKBONE.NAME": "build_senet_fpn"}, "build_senet_fpn_backbone"),
        ((), {"MODEL.ROI_HEADS.NAME": "StandardHeads"}, "StandardROIHeads"),
        ((), {"MODEL.DEVICE": "gpu"}, "expected cuda or cpu"),
        ((), {"SOLVER.IMS_PER_BATCH": "0"}, "IMS_PER_BATCH is 0; expected 1"),
        ((), {"SOLVER.MAX_ITER": "0"}, "MAX_ITER is 0; expected 1"),
        ((), {"DATALOADER.NUM_WORKERS": "-1"}, "NUM_WORKERS is -1; expected a number from 0"),
        ((), {"SOLVER.BASE_LR": "-0.1"}, "BASE_LR is -0.1; expected 0 or more"),
        ((), {"SOLVER.BASE_LR": "float('nan')"}, "BASE_LR"),
        ((), {"SOLVER.MOMENTUM": "1.5"}, "MOMENTUM is 1.5; expected a number from 0 to 1"),
        ((), {"SOLVER.CHECKPOINT_PERIOD": "0"}, "CHECKPOINT_PERIOD is 0; expected 1 or more"),
        ((), {"SOLVER.CHECKPOINTS_KEPT": "1"}, "CHECKPOINTS_KEPT is 1.*at least 2"),
        ((), {"DATASETS.TRAIN": "()"}, "DATASETS.TRAIN is empty"),
        ((), {"DATASETS.TRAIN": "(1,)"}, "expected dataset names"),
        ((), {"MODEL.SE.RATIO": "eight"}, "RATIO"),
    ],
)
@pytest.mark.long
def test_a_run_that_would_waste_time_is_rejected_with_a_remedy(command, flags, overrides, words):
    with pytest.raises(UserError, match=f"(?s){words}"):
        setup(command(*flags, **overrides))


def test_failed_weight_downloads_suggest_training_without_weights(command, monkeypatch, tmp_path):
    # Nothing listens on this port.
    entry = replace(
        catalogue_entry("cadene/se_resnet50"), url="http://127.0.0.1:9/a.pth", file="a.pth"
    )
    monkeypatch.setitem(load_catalogue(), "cadene/se_resnet50", entry)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"(?s)download.*{SCRATCH}"):
        setup(command(**{"MODEL.WEIGHTS": "cadene/se_resnet50"}))


def test_missing_coco_files_are_an_error_with_layout_source_and_commands(
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
    with pytest.raises(UserError, match="broken.yaml is not plain YAML"):
        load_config(str(path))


def test_classes_and_their_number_come_from_the_json(command, shapes):
    cfg = setup(command())
    data = json.loads((shapes / "annotations" / "instances_tiny.json").read_text())
    names = [category["name"] for category in data["categories"]]
    assert list(cfg.DATASETS.CLASSES) == names
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == len(names)


def test_the_output_folder_records_the_command_and_environment(command, tmp_path):
    cfg = setup(command())
    run = tmp_path / "run"
    saved = load_config(str(run / "config.yaml"))
    cfg.defrost()
    for config in (saved, cfg):
        # YAML reads the nested tuples of this key as lists.
        config.MODEL.pop("ROI_BOX_CASCADE_HEAD")
    assert saved == cfg
    environment = (run / "environment.txt").read_text()
    assert "torch==" in environment
    assert "detectron2" in environment


def test_results_for_spreadsheets_are_written_to_the_log_and_not_to_the_terminal(
    command, tmp_path, capsys
):
    setup(command())
    logging.getLogger("detectron2.engine.defaults").info("Evaluation results for x in csv format:")
    logging.getLogger("detectron2.evaluation.testing").info("copypaste: AP,AP50")
    logging.getLogger("detectron2.evaluation.testing").info("Evaluation results")
    said = capsys.readouterr().out
    assert "Evaluation results" in said
    assert "copypaste" not in said
    assert "csv" not in said
    assert "copypaste: AP,AP50" in (tmp_path / "run" / "log.txt").read_text()


def test_an_output_folder_that_cannot_be_created_is_rejected(command, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        setup(command(OUTPUT_DIR=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(("rate", "warned"), [("0.02", True), ("0.0025", False)])
def test_an_unscaled_learning_rate_logs_a_warning(command, caplog, rate, warned):
    logging.getLogger("senet_transfer").propagate = True
    with caplog.at_level(logging.WARNING):
        setup(command(**{"SOLVER.BASE_LR": rate}))
    assert any("scaled linearly" in record.message for record in caplog.records) == warned


def test_frozen_stages_of_random_weights_log_a_warning(command, caplog):
    logging.getLogger("senet_transfer").propagate = True
    with caplog.at_level(logging.WARNING):
        setup(command(**{"MODEL.BACKBONE.FREEZE_AT": "2"}))
    assert any("keep their random weights" in record.message for record in caplog.records)


def test_the_c4_head_that_would_drop_the_gates_is_rejected(command):
    keys = {"MODEL.BACKBONE.NAME": "build_senet_backbone", "MODEL.ROI_HEADS.NAME": "Res5ROIHeads"}
    with pytest.raises(UserError, match="Set MODEL.ROI_HEADS.NAME to SENetRes5ROIHeads"):
        setup(command(**keys))


def test_a_config_file_runs_no_code(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "hostile.yaml"
    path.write_text(f"SEED: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(UserError, match="not plain YAML"):
        load_config(str(path))
    base = tmp_path / "heir.yaml"
    base.write_text("_BASE_: hostile.yaml\n")
    with pytest.raises(UserError):
        load_config(str(base))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains a NoneType"),
        ("[1]", "contains a list"),
        ("_BASE_: c.yaml", "includes itself as its _BASE_"),
    ],
)
def test_files_other_than_configs_are_rejected(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(str(path))


def test_a_model_must_have_the_classes_it_was_trained_on(command, shapes, tmp_path):
    json_file = shapes / "annotations" / "instances_tiny.json"
    data = json.loads(json_file.read_text())
    names = [category["name"] for category in data["categories"]]
    for category in data["categories"]:
        category["name"] = f"other {category['name']}"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    (tmp_path / "w.pth").write_bytes(b"")
    args = command(
        "--eval-only", **{"DATASETS.CLASSES": str(names), "MODEL.WEIGHTS": str(tmp_path / "w.pth")}
    )
    args = replace(args, datasets=[["own", str(other), str(shapes / "tiny")]])
    with pytest.raises(UserError, match="trained on the classes"):
        setup(args)


def test_a_mask_head_requires_segmentations(command, shapes, tmp_path):
    data = json.loads((shapes / "annotations" / "instances_tiny.json").read_text())
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps(data))
    args = command(**{"MODEL.MASK_ON": "True"})
    args = replace(args, datasets=[["own", str(boxes), str(shapes / "tiny")]])
    with pytest.raises(UserError, match="no `segmentation`"):
        setup(args)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("MODEL: {SE: {RATIOS: 8}}", "no config key MODEL.SE.RATIOS. Did you mean MODEL.SE.RATIO"),
        (
            "NOTHING_LIKE_IT: 1",
            "no config key NOTHING_LIKE_IT. It is defined by neither",
        ),
        ("MODEL: {WEIGHTS: {FILE: x}}", "Expected a value of the same type as the key's default"),
        ("_BASE_: base.yaml\nSEED: 1", "no config key SOLVR. Did you mean SOLVER"),
    ],
)
def test_an_unknown_key_of_a_file_is_named(tmp_path, content, expected):
    (tmp_path / "base.yaml").write_text("SOLVR: {MAX_ITER: 3}")
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)


def test_setup_does_not_change_the_options(command, tmp_path, monkeypatch):
    """Check that setup does not modify the options, so that a launcher can restart the run."""
    run = command()
    before = replace(run)
    cfg = setup(run)
    assert not resumes(cfg, run)
    (tmp_path / "run" / "model_0000001.pth").touch()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    assert not resumes(cfg, run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resumes(cfg, run)
    assert not resumes(cfg, replace(run, eval_only=True))
    assert run == before
    with pytest.raises(FrozenInstanceError):
        run.resume = True


@pytest.mark.long
def test_the_python_api_requires_no_command_line(shapes, tmp_path):
    options = [word for item in SMALL.items() for word in item]
    own = ("own", f"{shapes}/annotations/instances_tiny.json", f"{shapes}/tiny")
    data = ["DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "()"]
    cfg = setup(
        RunOptions(
            "faster_rcnn_se_r50",
            [*options, *data, "OUTPUT_DIR", str(tmp_path)],
            datasets=[own],
        )
    )
    assert [list(own)] == cfg.DATASETS.REGISTER
    assert int(SMALL["SOLVER.MAX_ITER"]) == cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("INPUT.MIN_SIZE_TRAIN", "('x',)", "only numbers as list elements, found 'x'"),
        ("INPUT.MIN_SIZE_TRAIN", "(True,)", "only numbers as list elements, found True"),
        ("INPUT.CLASSIFICATION.RATIO", "((),)", r"only numbers as list elements, found \(\)"),
        ("MODEL.RPN.IN_FEATURES", "[1]", "only strings as list elements, found 1"),
        (
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
            "[0]",
            "only True or False as list elements, found 0",
        ),
        (
            "MODEL.ANCHOR_GENERATOR.SIZES",
            "[[32], ['x']]",
            "only numbers as list elements, found 'x'",
        ),
    ],
)
def test_elements_of_another_type_than_the_default_s_are_an_error(key, value, expected):
    with pytest.raises(UserError, match=f"{key} is .*{expected}"):
        load_config("", [key, value])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[32, 64.5]"),
        ("SOLVER.STEPS", "()"),
        ("MODEL.PIXEL_STD", "[58, 57.1, 57]"),
        ("DATASETS.REGISTER", "[['own', 'a.json', 'images']]"),
    ],
)
def test_lists_that_detectron2_takes_are_accepted(key, value):
    load_config("", [key, value])


@pytest.mark.parametrize("mistake", [AttributeError, TypeError, IndexError])
def test_a_programming_error_is_not_reported_as_a_user_s(command, monkeypatch, mistake):
    def build(trainer, cfg, model):
        raise mistake("a mistake of ours")

    monkeypatch.setattr(Trainer, "build_optimizer", build)
    cfg = setup(command())
    with pytest.raises(mistake, match="a mistake of ours"):
        Trainer(cfg)


@pytest.mark.parametrize(
    ("names", "flags", "options", "train", "test"),
    [
        (("a", "b"), (), (), ("a",), ("b",)),
        (("a", "b", "c"), (), (), ("a",), ("b",)),
        (("b", "a"), (), (), ("b",), ("a",)),
        # Without --eval-only, a single dataset is used for training but not for evaluation.
        (("a",), (), (), ("a",), ("my_val",)),
        (("a",), ("--eval-only",), (), ("a",), ("a",)),
        (("a", "b"), (), ("DATASETS.TRAIN", "('b',)"), ("b",), ("b",)),
        (("a", "b"), (), ("DATASETS.TEST", "('x',)"), ("a",), ("x",)),
        (("my_train", "b"), (), (), ("my_train",), ("b",)),
        (("a", "my_val"), (), (), ("a",), ("my_val",)),
        ((), (), (), ("my_train",), ("my_val",)),
    ],
)
def test_data_sets_with_other_names_than_the_recipes_are_used_in_their_order(
    names, flags, options, train, test
):
    words = ["--config-file", "configs/finetune_detector.yaml", *flags]
    for name in names:
        words += ["--dataset", name, f"{name}.json", name]
    run = run_options(argument_parser().parse_args([*words, *options]))
    cfg = load_config(run.config_file, run.options)
    cfg.DATASETS.REGISTER = [list(entry) for entry in run.datasets]
    use_named_datasets(cfg, run, logging.getLogger("test"))
    assert (train, test) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)


def test_registered_data_of_a_recipe_is_kept():
    words = ["--config-file", "configs/faster_rcnn_se_r50.yaml"]
    words += ["--dataset", "a", "a.json", "a", "--dataset", "b", "b.json", "b"]
    run = run_options(argument_parser().parse_args(words))
    cfg = load_config(run.config_file)
    use_named_datasets(cfg, run, logging.getLogger("test"))
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST == ("coco_2017_val",)
