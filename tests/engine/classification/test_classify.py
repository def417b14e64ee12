"""Tests for inference with a classifier on image files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms

from senet_transfer import UserError
from senet_transfer.engine.predictor.files import predict_files
from senet_transfer.engine.predictor.inputs import find_photos
from senet_transfer.engine.predictor.load import load


@pytest.mark.long
def test_the_top_classes_equal_the_models_with_names_and_probabilities(train, tree, tmp_path):
    model = train().model.eval()
    predictor = load(tmp_path / "run" / "model_final.pth")
    photos = find_photos([str(tree / "red"), str(tree / "nested" / "blue" / "0.jpg")])
    json_file = predict_files(predictor, photos, str(tmp_path / "out"), quiet=True)
    found = json.loads(Path(json_file).read_text())
    assert [entry["file_name"] for entry in found] == [photo.name for photo in photos]
    view = transforms.Compose(
        [transforms.Resize(36), transforms.CenterCrop(32), transforms.PILToTensor()]
    )
    for entry in found:
        with torch.no_grad():
            logits = model({"image": view(Image.open(entry["file_name"]))[None]})[0]
        best = logits.softmax(0).topk(4)
        assert [row["label"] for row in entry["top"]] == best.indices.tolist()
        assert [row["probability"] for row in entry["top"]] == pytest.approx(best.values.tolist())
        for row in entry["top"]:
            assert row["class"] == predictor.classes.things[row["label"]]


@pytest.mark.long
def test_the_command_prints_one_line_per_image(train, tree, tmp_path, run_python):
    train()
    line = ["tools/predict.py", "--weights", tmp_path / "run" / "model_final.pth"]
    line += ["--input", tree / "red", "--limit", "2", "--output", tmp_path / "out"]
    done = run_python(*line)
    assert done.returncode == 0, done.stderr
    first, _, last = done.stdout.strip().splitlines()
    assert first.startswith(f"{tree}/red/0.jpg: ")
    assert "%" in first
    assert last.endswith("predictions.json")


@pytest.mark.long
def test_unreadable_images_are_named_after_all_others_are_predicted(train, tree, tmp_path):
    train()
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    predictor = load(tmp_path / "run" / "model_final.pth")
    images = [str(tmp_path / "broken.jpg"), str(tree / "red" / "0.jpg")]
    with pytest.raises(UserError, match="(?s)1 of 2 images can't be read.*broken.jpg"):
        predict_files(predictor, images, str(tmp_path / "out"), quiet=True)
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entry["file_name"] == images[1]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output folder .*file can't be created"):
        predict_files(predictor, images, str(tmp_path / "file"))
