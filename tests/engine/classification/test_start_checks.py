"""Tests for checks of configs and data before training, and for resuming a finished run."""

import json
import logging
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from senet_transfer import UserError
from senet_transfer.cli.export import main as export
from senet_transfer.cli.export import parser as export_parser
from senet_transfer.cli.predict import main as predict
from senet_transfer.cli.predict import parser
from senet_transfer.config.load import load_config
from senet_transfer.data.own_data import DataPart
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.recipe.facts import describe_data
from senet_transfer.engine.setup import setup
from senet_transfer.engine.solver import epochs_to_iterations
from senet_transfer.engine.train import main
from senet_transfer.engine.trainer import Trainer
from tests.engine.classification.conftest import BATCH_NORM


@pytest.mark.parametrize("epochs", ["0.5", "0.1", "1.5", "3", "1e-1"])
@pytest.mark.parametrize("config", ["places365_se_r152", "finetune_folder"])
def test_epochs_may_be_fractions(epochs, config):
    cfg = load_config(config, ["SOLVER.EPOCHS", epochs, "TEST.EVAL_EPOCHS", epochs])
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.IMS_PER_BATCH = 1, (), 4
    counted = epochs_to_iterations(cfg, 40)
    assert math.ceil(float(epochs) * 10 - 1e-9) == counted.SOLVER.MAX_ITER
    assert counted.TEST.EVAL_PERIOD == counted.SOLVER.MAX_ITER
    assert load_config(config, ["SOLVER.EPOCHS", "None"]).SOLVER.EPOCHS is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("batch", "micro", "crop", "valid"),
    [(1, 1, 32, False), (2, 2, 32, False), (2, 1, 32, True), (1, 1, 33, True)],
)
def test_a_batch_norm_with_one_value_per_channel_is_found_at_start(
    command, batch, micro, crop, valid
):
    options = {
        **BATCH_NORM,
        "INPUT.CLASSIFICATION.CROP": str(crop),
        "SOLVER.IMS_PER_BATCH": str(batch),
        "SOLVER.MICRO_BATCHES": str(micro),
    }
    cfg = setup(command(**options))
    if not valid:
        with pytest.raises(UserError, match=r"(?s)more than one value per channel.*IMS_PER_BATCH"):
            Trainer(cfg)
    # Check that PyTorch itself raises an error in the same cases.
    model = Trainer.build_model(cfg).backbone.train()
    images = torch.zeros(batch // micro, 3, crop, crop)
    if valid:
        Trainer(cfg)
        model(images)
    else:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(images)


@pytest.mark.long
def test_auto_class_weights_are_the_inverse_frequencies_with_a_mean_of_1(command, tmp_path):
    data = tmp_path / "data"
    for name, count in (("rare", 1), ("common", 4), ("medium", 2)):
        (data / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 40)).save(data / name / f"{index}.png")
    auto = {"DATASETS.TRAIN": f"('{data}',)", "DATASETS.TEST": f"('{data}',)",
            "MODEL.CLASSIFIER.CLASS_WEIGHTS": "auto"}  # fmt: skip
    cfg = setup(command(**auto))
    assert cfg.DATASETS.CLASSES == ["common", "medium", "rare"]
    expected = [3 / 7, 6 / 7, 12 / 7]  # 1/4, 1/2 and 1, divided by their mean of 7/12
    assert pytest.approx(expected) == cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS
    assert Trainer.build_model(cfg).class_weights.tolist() == pytest.approx(expected)
    saved = load_config(f"{cfg.OUTPUT_DIR}/config.yaml")
    assert saved.MODEL.CLASSIFIER.CLASS_WEIGHTS == cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS
    for weights in ("[1.0, 2.0]", "[1.0, -1.0, 2.0]", "[0, 0, 0]", "balanced"):
        said = "expected auto, or 3 non-negative numbers, .* common, medium, rare"
        with pytest.raises(UserError, match=said):
            setup(command("--overwrite", **{**auto, "MODEL.CLASSIFIER.CLASS_WEIGHTS": weights}))


@pytest.mark.long
def test_keys_of_detectors_are_rejected_and_augmentation_trains(command, train):
    with pytest.raises(UserError, match="INPUT.BRIGHTNESS is .* only supported for detectors"):
        setup(command(**{"INPUT.BRIGHTNESS": "(0.8, 1.2)"}))
    trainer = train(
        **{
            "INPUT.CLASSIFICATION.POLICY": "trivial_augment",
            "INPUT.CLASSIFICATION.ERASING": "0.5",
            "MODEL.CLASSIFIER.LOSS": "focal",
            "MODEL.CLASSIFIER.CLASS_WEIGHTS": "auto",
        }
    )
    assert trainer.cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS == [1.0] * 4


@pytest.mark.long
def test_class_lists_of_another_length_are_rejected_in_prediction_and_export(
    command, tmp_path, tree
):
    cfg = setup(command())
    model = Trainer.build_model(cfg)
    Checkpointer(model, cfg.OUTPUT_DIR).save("model_final")
    weights = f"{cfg.OUTPUT_DIR}/model_final.pth"
    assert load_trained(weights).classes == cfg.DATASETS.CLASSES
    words = ["--weights", weights, "--input", str(tree / "red"), "--output", str(tmp_path / "out")]
    for names in (["a", "b", "c"], ["a", "b", "c", "d", "e"]):
        edited = load_config(f"{cfg.OUTPUT_DIR}/config.yaml")
        edited.DATASETS.CLASSES = names
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text(edited.dump())
        complaint = f"contains {len(names)} names, but .* is 4"
        for use in (
            lambda: load_trained(weights),
            lambda: predict(parser().parse_args(words)),
            lambda: export(
                export_parser().parse_args(
                    ["--weights", weights, "--output", str(tmp_path / "network.onnx")]
                )
            ),
        ):
            with pytest.raises(UserError, match=complaint):
                use()


@pytest.mark.long
def test_resuming_a_finished_run_adds_no_iteration(command):
    options = command()
    main(options)
    folder = Path(setup(command("--resume")).OUTPUT_DIR)
    before = torch.load(folder / "model_final.pth", weights_only=False)
    for _ in range(2):
        main(command("--resume"))
        results = json.loads((folder / "results.json").read_text())
        assert results["training"]["iterations"] == 2
        after = torch.load(folder / "model_final.pth", weights_only=False)
        assert after["iteration"] == before["iteration"] == 1
        assert all(torch.equal(after["model"][name], t) for name, t in before["model"].items())
    rows = [json.loads(row) for row in (folder / "metrics.json").read_text().splitlines()]
    assert max(row["iteration"] for row in rows) <= 2
    # If MAX_ITER is increased, a resumed run trains only the missing steps.
    main(command("--resume", **{"SOLVER.MAX_ITER": "3"}))
    assert json.loads((folder / "results.json").read_text())["training"]["iterations"] == 3


def test_a_missing_shard_is_found_at_start(command, shards, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in shards.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    last = sorted(copied.glob("*.tar"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=rf"1 of \d+ shards .*missing: {last.name}"):
        setup(command(**{"DATASETS.TRAIN": f"('{copied}',)", "DATASETS.TEST": "()"}))


@pytest.mark.long
def test_an_error_inside_training_has_no_traceback(command, monkeypatch):
    def step(*_):
        raise UserError("a broken shard")

    monkeypatch.setattr(Trainer, "run_step", step)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logging.getLogger("detectron2.engine.train_loop"), "handlers", [handler])
    with pytest.raises(UserError, match="a broken shard"):
        main(command())
    assert [record for record in records if record.exc_info] == []
    monkeypatch.setattr(Trainer, "run_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command("--overwrite"))
    assert [record.exc_info[0] for record in records if record.exc_info] == [ZeroDivisionError]


@pytest.mark.parametrize("largest", [4095, 20000])
def test_dark_16_bit_images_are_a_warning(largest, command, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        pixels = np.linspace(0, largest, 900).astype(np.uint16).reshape(30, 30)
        Image.fromarray(pixels).save(tmp_path / "data" / name / "grey.png")
        cv2.imwrite(str(tmp_path / "data" / name / "rgb.png"), np.dstack([pixels] * 3))
    names = {f"DATASETS.{which}": f"('{tmp_path / 'data'}',)" for which in ("TRAIN", "TEST")}
    for value_range in ("[]", "[0, 4095]"):
        out = tmp_path / value_range
        setup(command(**names, **{"INPUT.VALUE_RANGE": value_range, "OUTPUT_DIR": str(out)}))
        said = "12-bit data, set INPUT.VALUE_RANGE to [0, 4095]" in (out / "log.txt").read_text()
        assert said == (largest == 4095 and value_range == "[]")


def test_an_image_of_too_many_pixels_is_skipped_by_a_recipe(tmp_path, monkeypatch):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / name / "a.png")
    Image.new("L", (500, 500)).save(tmp_path / "dogs" / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "dogs" / "b.png")
    part = DataPart(str(tmp_path), "")
    assert describe_data(part, part).short_side == 30
