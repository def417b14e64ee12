"""Tests for image and folder names in any script, Unicode normalisation form or encoding."""

import csv
import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from senet_transfer import UserError
from senet_transfer.cli.evaluate import main as evaluate
from senet_transfer.cli.evaluate import parser as evaluate_parser
from senet_transfer.cli.predict import command as predict
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.shards.write import convert
from senet_transfer.engine.setup import setup
from senet_transfer.engine.train import main
from tests.data.drawn_places import jpeg

NFC = unicodedata.normalize("NFC", "Café")
NFD = unicodedata.normalize("NFD", "Café")
CHINESE = "咖啡 杯"


def write(root: Path, names: list[str], images: tuple[bytes, ...] = (b"1.jpg",)) -> Path:
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for image in images:
            with open(os.path.join(os.fsencode(root / name), image), "wb") as stream:
                stream.write(jpeg(seed, (32, 32)))
    return root


@pytest.mark.long
@pytest.mark.parametrize("form", ["folder", "shards"])
def test_names_survive_training_evaluation_and_prediction(command, tmp_path, capsys, form):
    images = (b"caf\xe9.jpg", "\u8336.jpg".encode(), "cafe\u0301 \u2615.jpg".encode())
    train = write(tmp_path / "train", [NFC, CHINESE], images)
    val = write(tmp_path / "val", [NFD, CHINESE], images)
    data = {"DATASETS.TRAIN": f"('{train}',)", "DATASETS.TEST": f"('{val}',)"}
    broken = train / CHINESE / os.fsdecode(b"bris\xe9.jpg")
    broken.write_bytes(b"broken")
    run = command(**data, **{"SOLVER.IMS_PER_BATCH": "4", "SOLVER.MAX_ITER": "2"})
    main(run)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "bris\\udce9.jpg" in log
    weights = str(tmp_path / "run" / "model_final.pth")
    if form == "shards":
        source = open_folder(val, [NFC, CHINESE])
        convert(source, tmp_path / "shards", split="val")
        val = tmp_path / "shards"
    words = ["--weights", weights, "--data", str(val), "--workers", "0",
             "--predictions", str(tmp_path / "out.csv")]  # fmt: skip
    results = evaluate(evaluate_parser().parse_args(words))
    assert results["images"] == 6
    with open(tmp_path / "out.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {NFC, CHINESE}
    if form == "folder":
        reference = ImageFolder(val)
        names = {NFD: NFC, CHINESE: CHINESE}
        assert {row["path"]: row["class"] for row in rows} == {
            path: names[reference.classes[label]] for path, label in reference.samples
        }
        paths = ["--input", str(val / NFD), "--output", str(tmp_path / "predictions")]
        predict(["--weights", weights, *paths])
        assert "caf\\udce9.jpg: " in capsys.readouterr().out
        found = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
        assert sorted(row["file_name"] for row in found) == sorted(
            path for path, label in reference.samples if reference.classes[label] == NFD
        )
    else:
        assert len({row["path"] for row in rows}) == 6
        assert all(row["path"].startswith(f"{val}/val-000000.tar/") for row in rows)


@pytest.mark.parametrize("open_any", [open_dataset, lambda path, classes=None: open_cifar(
    path.parent, split=path.name, classes=classes)])  # fmt: skip
@pytest.mark.parametrize(("there", "given"), [(NFC, NFD), (NFD, NFC)])
def test_class_folders_match_classes_in_another_unicode_form(tmp_path, open_any, there, given):
    root = write(tmp_path / "test", [there, "tea", CHINESE])
    classes = ["tea", given, CHINESE]
    found = open_any(root, classes=classes)
    assert list(found.classes) == classes
    # ImageFolder sorts the folders by name.
    own = ImageFolder(root).classes
    expected = [classes.index(given if name == there else name) for name in own]
    labels = found.labels
    assert list(labels.tolist() if open_any is not open_dataset else labels()) == expected


def test_class_folders_that_are_not_utf8_are_rejected_when_listed(command, shared_data, tmp_path):
    root = write(tmp_path / "train", ["tea"])
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    shutil.copy(root / "tea" / "1.jpg", os.fsdecode(os.fsencode(root) + b"/caf\xe9/1.jpg"))
    with pytest.raises(UserError, match=r"caf\\xe9.* is not valid UTF-8"):
        setup(command(**{"DATASETS.TRAIN": f"('{root}',)", "DATASETS.TEST": "()"}))
    folders = shared_data.parent / "cases" / "classification" / "folders"
    train = open_dataset(folders / "nfc_nfd" / "train")
    val = open_dataset(folders / "nfc_nfd" / "val", classes=train.classes)
    assert (val.classes, val.labels().tolist()) == (train.classes, [0, 1])


def test_a_root_whose_name_is_not_utf_8_is_an_error(command, tmp_path, monkeypatch):
    root = tmp_path / os.fsdecode(b"donn\xe9es")
    write(root / "train", ["cat", "dog"])
    message = r"DATASETS.TRAIN is .*donn\\udce9es.*, which is not valid UTF-8 .* symbolic link"
    with pytest.raises(UserError, match=message):
        setup(command(**{"DATASETS.TRAIN": f"['{root / 'train'}']"}))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    data = {f"DATASETS.{which}": "('train',)" for which in ("TRAIN", "TEST")}
    with pytest.raises(UserError, match=message):
        setup(command(**data))
    os.symlink(root, tmp_path / "data")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    assert setup(command("--overwrite", **data)).DATASETS.CLASSES == ["cat", "dog"]
