"""Tests for training, checkpointing, evaluation and inference with a small detector."""

import contextlib
import io
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from senet_transfer import UserError
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.predictor.files import predict_files
from senet_transfer.engine.predictor.inputs import find_photos
from senet_transfer.engine.predictor.load import load, load_trained
from senet_transfer.engine.predictor.predictor import DetectorPredictor
from senet_transfer.engine.setup import resumes, setup
from senet_transfer.engine.trainer import Trainer


def train(args) -> Trainer:
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return trainer


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]


@pytest.mark.long
def test_a_run_saves_and_resumes_at_the_same_step(command, tmp_path):
    run = tmp_path / "run"
    train(command(**{"SOLVER.MAX_ITER": "2", "SOLVER.STEPS": "(1,)"}))
    first = torch.load(run / "model_final.pth", weights_only=True)
    assert first["iteration"] == 1
    trainer = Trainer(setup(command("--resume")))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    for key, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, first["model"][key], rtol=0, atol=0)
    momenta = trainer.optimizer.state_dict()["state"]
    assert len(momenta) == len([p for p in trainer.model.parameters() if p.requires_grad])
    trainer.train()
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 3
    assert (run / "model_0000001.pth").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    assert "total_loss" in metrics(run)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.long
def test_mixed_precision_trains_and_resumes_on_any_device(command, dtype, tmp_path):
    amp = {"SOLVER.AMP.ENABLED": "True", "SOLVER.AMP.DTYPE": dtype}
    trainer = train(command(**{**amp, "SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()"}))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    scaler = saved["trainer"]["_trainer"]["grad_scaler"]
    assert ("scale" in scaler) == (dtype == "float16")
    resumed = train(command("--resume", **{**amp, "SOLVER.MAX_ITER": "2", "SOLVER.STEPS": "(1,)"}))
    assert resumed.start_iter == 1


@pytest.mark.long
def test_an_epoch_of_a_detector_consists_of_the_images_with_objects(command, shapes, tmp_path):
    content = json.loads((shapes / "annotations" / "instances_tiny.json").read_text())
    empty = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
    (tmp_path / "few.json").write_text(json.dumps(content))
    keys = {
        "DATASETS.REGISTER": str([["few", str(tmp_path / "few.json"), f"{shapes}/tiny"]]),
        "DATASETS.TRAIN": "('few',)",
        "SOLVER.EPOCHS": "2",
        "SOLVER.STEP_EPOCHS": "(0.5, 1)",
        "SOLVER.WARMUP_EPOCHS": "0.25",
        "SOLVER.CHECKPOINT_EPOCHS": "0.5",
        "TEST.EVAL_EPOCHS": "1",
        "SOLVER.MAX_ITER": "40000",
        "SOLVER.STEPS": "(30000,)",
    }
    # Only 7 of the 8 images have objects, so an epoch has 3.5 steps of 2 images.
    trainer = train(command(**keys))
    solver = trainer.cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (7, (2, 4), 1)
    assert (solver.CHECKPOINT_PERIOD, trainer.cfg.TEST.EVAL_PERIOD) == (2, 4)
    assert torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["iteration"] == 6
    everything = {"DATALOADER.FILTER_EMPTY_ANNOTATIONS": "False", "OUTPUT_DIR": str(tmp_path / "b")}
    assert Trainer(setup(command(**{**keys, **everything}))).max_iter == 8
    longer = train(command("--resume", **{**keys, "SOLVER.EPOCHS": "2.5"}))
    assert (longer.start_iter, longer.iter) == (7, 9)


def test_an_unknown_precision_is_rejected(command):
    amp = {"SOLVER.AMP.ENABLED": "True", "SOLVER.AMP.DTYPE": "float8"}
    with pytest.raises(UserError, match="float8.*expected float16 or bfloat16"):
        Trainer(setup(command(**amp)))


@pytest.mark.long
def test_the_predictions_evaluated_by_pycocotools_give_the_printed_ap(command, shapes, tmp_path):
    trainer = train(command())
    printed = trainer.results["bbox"]
    written = tmp_path / "run" / "inference" / "own" / "coco_instances_results.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shapes / "annotations" / "instances_tiny.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(written)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    for key, value in zip(("AP", "AP50", "AP75"), evaluation.stats, strict=False):
        assert printed[key] == 100 * value


@pytest.mark.long
def test_an_incompatible_checkpoint_is_rejected_with_all_tensors(command, tmp_path):
    trainer = Trainer(setup(command()))
    state = trainer.model.state_dict()
    state["extra.weight"] = torch.zeros(1)
    removed = "backbone.bottom_up.res2.0.se.fc1.weight"
    del state[removed]
    path = tmp_path / "other.pth"
    torch.save({"model": state}, path)
    with pytest.raises(UserError) as error:
        Checkpointer(trainer.model).load(str(path))
    assert f"missing from the file: {removed}" in str(error.value)
    assert "unexpected: extra.weight" in str(error.value)
    assert str(path) in str(error.value)


@pytest.fixture
def trained(command, tmp_path):
    """Train a detector for two iterations, and return the path of its checkpoint."""
    train(command(**{"SOLVER.MAX_ITER": "2", "SOLVER.STEPS": "(1,)"}))
    return str(tmp_path / "run" / "model_final.pth")


@pytest.mark.long
def test_predictions_on_images_are_drawn_and_written_in_cocos_format(trained, shapes, tmp_path):
    loaded = load_trained(trained)
    cfg = loaded.cfg
    photos = find_photos([str(shapes / "tiny"), str(shapes / "val" / "*.jpg")])[:3]
    images = [photo.name for photo in photos]
    out = tmp_path / "predictions"
    json_file = predict_files(
        DetectorPredictor.of(loaded, threshold=0), images, str(out), quiet=True
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(json_file)
    assert [image["file_name"] for image in coco.dataset["images"]] == images
    assert [category["name"] for category in coco.dataset["categories"]] == cfg.DATASETS.CLASSES
    # Boxes, scores and classes must equal those of Detectron2's predictor.
    theirs = DefaultPredictor(cfg)
    for image_id, path in enumerate(images, start=1):
        instances = theirs(cv2.imread(path))["instances"].to("cpu")
        found = coco.imgToAnns[image_id]
        assert len(found) == len(instances) > 0
        boxes = instances.pred_boxes.tensor.numpy()
        boxes[:, 2:] -= boxes[:, :2]
        np.testing.assert_allclose([a["bbox"] for a in found], boxes, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose([a["score"] for a in found], instances.scores, rtol=1e-5)
        assert [a["category_id"] - 1 for a in found] == instances.pred_classes.tolist()
        assert cv2.imread(str(out / path.rpartition("/")[2])) is not None


@pytest.mark.long
def test_test_time_augmentation_predicts_and_evaluates(trained, shapes, command):
    sizes = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 96)", "TEST.AUG.MAX_SIZE"]
    cfg = load_trained(trained, "", [*sizes, "128"]).cfg
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(trained)
    results = Trainer.evaluate(setup_tta(command, trained), model)
    assert set(results) == {"bbox", "bbox_TTA"}


def setup_tta(command, weights):
    keys = {"TEST.AUG.MIN_SIZES": "(64, 96)", "TEST.AUG.MAX_SIZE": "128"}
    keys |= {"TEST.AUG.ENABLED": "True", "MODEL.WEIGHTS": weights}
    return setup(command("--eval-only", **keys))


def test_images_are_found_by_file_folder_and_pattern_once_each(shapes):
    folder = shapes / "tiny"
    files = sorted(str(path) for path in folder.glob("*.jpg"))
    for inputs in ([str(folder)], [str(folder / "*.jpg"), files[0]]):
        assert [photo.name for photo in find_photos(inputs)] == files
    with pytest.raises(UserError, match="No image matches"):
        find_photos([str(folder / "*.png")])


@pytest.mark.long
def test_a_drawing_never_overwrites_an_image(trained, shapes):
    images = find_photos([str(shapes / "tiny")])[:1]
    with pytest.raises(UserError, match="would be overwritten"):
        predict_files(load(trained), images, str(shapes / "tiny"))


@pytest.mark.long
def test_an_unreadable_image_is_named_and_all_others_are_predicted(trained, shapes, tmp_path):
    broken, out = tmp_path / "broken.jpg", tmp_path / "out"
    broken.write_bytes(b"not a picture")
    images = [str(broken), *sorted(map(str, (shapes / "tiny").glob("*.jpg")))[:2]]
    with pytest.raises(UserError, match="(?s)1 of 3 images.*broken.jpg can't be read"):
        predict_files(load(trained), images, str(out))
    written = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in written["images"]] == images[1:]


@pytest.mark.long
def test_predictions_have_the_data_sets_own_category_ids(command, shapes, tmp_path):
    data = json.loads((shapes / "annotations" / "instances_tiny.json").read_text())
    for section, key in (("categories", "id"), ("annotations", "category_id")):
        for item in data[section]:
            item[key] *= 10
    json_file = tmp_path / "tens.json"
    json_file.write_text(json.dumps(data))
    args = command(**{"SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()"})
    args = replace(args, datasets=[["own", str(json_file), str(shapes / "tiny")]])
    train(args)
    predictor = load(str(tmp_path / "run" / "model_final.pth"), threshold=0)
    images = find_photos([str(shapes / "tiny")])[:2]
    predict_files(predictor, images, str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [category["id"] for category in written["categories"]] == [10, 20, 30, 40, 50]
    assert {a["category_id"] for a in written["annotations"]} <= {10, 20, 30, 40, 50}


@pytest.mark.long
def test_mixed_precision_can_be_enabled_when_resuming(command):
    train(command(**{"SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()"}))
    amp = {"SOLVER.AMP.ENABLED": "True", "SOLVER.AMP.DTYPE": "float16"}
    train(command("--resume", **{**amp, "SOLVER.MAX_ITER": "2", "SOLVER.STEPS": "(1,)"}))


def test_a_checkpoint_without_its_config_is_an_error_with_a_remedy(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="--config-file"):
        load_trained(str(path))
    with pytest.raises(UserError, match="The checkpoint .* does not exist"):
        load_trained(str(tmp_path / "other.pth"))


@pytest.mark.long
def test_a_restarted_command_resumes_but_a_new_one_starts_from_scratch(
    command, tmp_path, monkeypatch
):
    short = {"SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    first = command(**short)
    # Without a checkpoint, a run cannot be resumed.
    cfg = setup(first)
    assert not resumes(cfg, first)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    again = command()
    cfg = setup(again)
    assert cfg.SOLVER.MAX_ITER == 4
    assert resumes(cfg, again)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    anew = command("--overwrite", **short)
    cfg = setup(anew)
    assert not resumes(cfg, anew)
    assert not (tmp_path / "run" / "last_checkpoint").exists()
    assert not (tmp_path / "run" / "model_final.pth").exists()
