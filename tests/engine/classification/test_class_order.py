"""Tests for the class order of folders with numeric names, in training and evaluation."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torchvision.datasets import ImageFolder

from senet_transfer import UserError
from senet_transfer.cli.data import prepare
from senet_transfer.config.load import load_config
from senet_transfer.data.build import open_test_dataset
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.shards.manifest import load_manifest
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from tests.data.drawn_places import jpeg

NUMERIC = ["1", "9", "10"]


@pytest.fixture
def numbered(tmp_path):
    for name in NUMERIC:
        (tmp_path / "numbered" / name).mkdir(parents=True)
        (tmp_path / "numbered" / name / "1.jpg").write_bytes(jpeg(int(name), (32, 32)))
    return tmp_path / "numbered"


@pytest.mark.parametrize("open_any", [open_dataset, lambda path: open_cifar(path, split="train")])
@pytest.mark.parametrize(
    ("names", "warns"),
    [
        (NUMERIC, True),
        (["8", "9"], False),
        (["01", "09", "10"], False),
        (["1", "10", "9", "nine"], False),
        (["-1", "-2", "0"], True),
    ],
)
def test_folders_named_by_numbers_have_image_folders_order_with_a_warning(
    tmp_path, caplog, open_any, names, warns
):
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.jpg").write_bytes(jpeg(1, (32, 32)))
    root = tmp_path if open_any is not open_dataset else tmp_path / "train"
    with caplog.at_level(logging.WARNING):
        found = open_any(root)
    assert list(found.classes) == ImageFolder(tmp_path / "train").classes
    assert any("are numbers" in text for text in caplog.messages) == warns
    if warns:
        by_number = ", ".join(sorted(names, key=int))
        assert f"{', '.join(found.classes)}. The numeric order would be: {by_number}." in (
            caplog.text
        )


def test_the_real_case_of_folders_named_by_numbers(shared_data, caplog):
    root = shared_data.parent / "cases" / "classification" / "folders" / "uint"
    assert open_dataset(root).classes == ImageFolder(root).classes == ["1", "10", "9"]
    assert "1, 9, 10" in caplog.text


@pytest.mark.parametrize("choice", ["numeric", "file"])
def test_the_order_is_chosen_with_classes(command, numbered, tmp_path, caplog, choice):
    own = ["10", "1", "9"]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(own) + "\r\n")
    given, expected = ("numeric", NUMERIC) if choice == "numeric" else (tmp_path / "list.txt", own)
    data = {f"DATASETS.{key}": f"('{numbered}',)" for key in ("TRAIN", "TEST")}
    cfg = setup(command("--classes", str(given), **data))
    assert expected == cfg.DATASETS.CLASSES
    found = open_test_dataset(cfg, str(numbered))
    assert [found.read_sample(i).data for i in range(3)] == [
        jpeg(int(expected[label]), (32, 32)) for label in found.labels()
    ]
    prepare("folder", ["--source", str(numbered), "--output", str(tmp_path / "shards"), "--quiet",
                       "--workers", "1", "--classes", str(given)])  # fmt: skip
    assert load_manifest(str(tmp_path / "shards")).classes == expected
    # The user has chosen the order, so no warning is needed.
    assert "are numbers" not in caplog.text + Path(cfg.OUTPUT_DIR, "log.txt").read_text()


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ("numeric", "classes in .* are not numbers: blue"),
        ("missing.txt", "Cannot read the class list missing.txt"),
        ("twice.txt", "contains red more than once"),
        ("empty.txt", "is empty"),
        ("other.txt", "not among the 2 expected classes"),
    ],
)
def test_an_order_that_does_not_fit_is_rejected(
    command, tmp_path, monkeypatch, tree, choice, complaint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.txt").write_text("red\nblue\nred\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=complaint):
        setup(
            command(
                "--classes",
                choice,
            )
        )


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--classes", "numeric")])
def test_a_checkpoints_own_order_has_priority(command, numbered, tmp_path, flags):
    data = {f"DATASETS.{key}": f"('{numbered}',)" for key in ("TRAIN", "TEST")}
    own = ["9", "10", "1"]
    cfg = setup(command(**data))
    torch.manual_seed(0)
    Checkpointer(Trainer.build_model(cfg), str(tmp_path), classes=own).save("weights")
    weights = {"MODEL.WEIGHTS": str(tmp_path / "weights.pth")}
    cfg = setup(command("--eval-only", *flags, **data, **weights))
    assert own == cfg.DATASETS.CLASSES
    assert open_test_dataset(cfg, str(numbered)).classes == own
    assert own == load_config(f"{cfg.OUTPUT_DIR}/config.yaml").DATASETS.CLASSES
    log = Path(cfg.OUTPUT_DIR, "log.txt").read_text()
    assert "The class order of the weights is used: 9, 10, 1" in log
    # Also check training that starts from the weights, and data without one of the classes.
    cfg = setup(command("--overwrite", *flags, **data, **weights))
    assert own == cfg.DATASETS.CLASSES
    part = shutil.copytree(numbered, tmp_path / "part")
    shutil.rmtree(part / "10")
    cfg = setup(command("--eval-only", **{"DATASETS.TEST": f"('{part}',)"}, **weights))
    assert own == cfg.DATASETS.CLASSES
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 3
    assert sorted(open_test_dataset(cfg, str(part)).labels().tolist()) == [0, 2]
