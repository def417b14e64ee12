"""Tests that training, evaluation and prediction find the same images and classes in a folder."""

import logging
import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from senet_transfer import UserError
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.folders import choose_classes
from senet_transfer.data.own_data import find_parts
from senet_transfer.engine.predictor.inputs import find_photos
from tests.data.drawn_places import jpeg


@pytest.fixture
def root(tmp_path) -> Path:
    """Return a folder with the class folders a, b and c, which contain two images each."""
    return tree(tmp_path / "train", "a", "b", "c")


def tree(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for name in ("0.jpg", "1.jpg"):
            (root / folder / name).write_bytes(jpeg(0))
    return root


def test_a_link_to_a_folder_that_contains_it_is_left_out(root, caplog):
    (root / "a" / "up").symlink_to("..")
    (root / "b" / "self").symlink_to(".")
    data = open_dataset(root)
    assert data.classes == ImageFolder(root).classes == ["a", "b", "c"]
    assert data.labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert "a/up, because it points to one of its parent folders." in caplog.text
    assert len(find_photos([str(root)])) == 6


def test_links_to_other_folders_are_followed_by_every_entry(root, tmp_path):
    tree(tmp_path / "elsewhere", "x")
    (root / "d").symlink_to(tmp_path / "elsewhere" / "x")
    (root / "e").symlink_to("a")
    expected = [path for path, _ in ImageFolder(root).samples]
    data = open_dataset(root)
    assert [data.read_sample(index).path for index in range(len(data))] == expected
    assert [photo.name for photo in find_photos([str(root)])] == expected


@pytest.mark.parametrize("unreadable", ["", "b"])
@pytest.mark.parametrize("entry", ["train", "evaluate", "cifar", "predict"])
def test_a_folder_that_cannot_be_read_is_an_error(root, unreadable, entry, monkeypatch):
    def denied(real):
        def read(path="."):
            if os.fspath(path).rstrip("/") == str(root / unreadable):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        return read

    # Permissions do not apply to root, so the system calls are replaced.
    monkeypatch.setattr(os, "scandir", denied(os.scandir))
    monkeypatch.setattr(os, "listdir", denied(os.listdir))
    read = {
        "train": lambda: open_dataset(find_parts(str(root))[0].path),
        "evaluate": lambda: open_dataset(root),
        "cifar": lambda: open_cifar(root, split="train"),
        "predict": lambda: find_photos([str(root)]),
    }[entry]
    with pytest.raises(UserError, match=f"Cannot read the folder {root / unreadable}.*denied"):
        read()


def test_a_class_folder_that_is_a_broken_link_is_an_error(root):
    (root / "d").symlink_to("missing")
    for read in (open_dataset, lambda path: find_photos([str(path)])):
        with pytest.raises(UserError, match="train/d points to missing, which does not exist"):
            read(root)


def test_numeric_order_rejects_empty_class_folders_as_the_default_does(tmp_path):
    root = tree(tmp_path / "numbers", "0", "1", "2", "10")
    assert choose_classes("numeric", root) == ["0", "1", "2", "10"]
    (root / "3").mkdir()
    for read in (open_dataset, lambda path: choose_classes("numeric", path)):
        with pytest.raises(UserError, match="1 folders .* contain no images: 3"):
            read(root)


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("train/a train/b val/a val/b test/a extra/z", "test, train, val"),
        ("train/a train/b dev/a dev/b", "dev, train"),
        ("images_train/a images_train/b images_val/b", "images_train, images_val"),
        ("train2017/a/x train2017/b val2017/a/x", "train2017, val2017"),
        ("train/a train/b", "train"),
        ("train bus", ""),
        ("train", ""),
        ("train/steam train/electric bus/electric bus/diesel", ""),
        ("training_shoes/red boots/brown", ""),
    ],
)
def test_splits_are_not_detected_as_classes(tmp_path, folders, splits):
    root = tree(tmp_path / "data", *folders.split())
    if splits:
        with pytest.raises(UserError, match=f"contains the folders {splits}.*, which are splits"):
            open_dataset(root)
    assert open_dataset(root, classes=folders.split()).classes == folders.split()
    assert splits or open_dataset(root).classes == sorted(folders.split())


def test_prediction_names_the_files_that_it_ignores(root, caplog):
    for name in ("1.heic", "2.psd"):
        (root / "b" / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(find_photos([str(root)])) == 6
    assert f"Ignoring 2 files in {root}/b that are not images: 1.heic, 2.psd" in caplog.text
