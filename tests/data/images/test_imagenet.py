"""Tests that ImageNet archives and folders give the same labels as torchvision's ImageNet."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import ImageNet
from torchvision.datasets.imagenet import ARCHIVE_META

from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.imagenet import DEVKIT, open_imagenet
from senet_transfer.errors import UserError
from tests.data.drawn_places import command, jpeg

# (number in the devkit, WordNet id, names, number of children). Neither rows nor numbers are sorted
# by WordNet id, and nodes with children are not classes.
SYNSETS = (
    (1, "n02119789", "kit fox, Vulpes macrotis", 0),
    (2, "n02100735", "English setter", 0),
    (3, "n01440764", "tench, Tinca tinca", 0),
    (4, "n02012849", "crane", 0),
    (5, "n00001740", "entity", 4),
)
NUMBERS = (3, 1, 4, 4, 2, 1, 3, 2)  # the devkit's labels for the validation images


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def devkit():
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    rows = np.empty((len(SYNSETS), 1), [(field, object) for field in fields])
    for row, (number, wnid, words, children) in zip(rows, SYNSETS, strict=True):
        row[0] = (number, wnid, words, "", children, np.arange(children))
    meta = io.BytesIO()
    savemat(meta, {"synsets": rows})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in NUMBERS).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    return buffer.getvalue()


def train_archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for place, (_, wnid, _, children) in enumerate(SYNSETS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for number in range(place + 1):
                    add(images, f"{wnid}_{number}.JPEG", jpeg(10 * place + number))
            if not children:
                add(tar, f"{wnid}.tar", inner.getvalue())
    return buffer.getvalue()


def val_archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in reversed(range(len(NUMBERS))):
            add(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", jpeg(100 + number))
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Write small ImageNet archives and make torchvision accept their checksums."""
    contents = {"devkit": devkit(), "train": train_archive(), "val": val_archive()}
    (tmp_path / "imagenet").mkdir()
    for part, content in contents.items():
        name, _ = ARCHIVE_META[part]
        (tmp_path / "imagenet" / name).write_bytes(content)
        monkeypatch.setitem(ARCHIVE_META, part, (name, hashlib.md5(content).hexdigest()))
    return tmp_path / "imagenet"


def content(dataset):
    return sorted(
        (sample.data, sample.label)
        for unit in range(len(dataset.unit_sizes))
        for sample in dataset.read_unit(unit)
    )


def of_torchvision(root, split):
    """Unpack and read ImageNet with torchvision; return the classes and (image, label) pairs."""
    dataset = ImageNet(root, split)
    images = [(Path(path).read_bytes(), label) for path, label in dataset.samples]
    return dataset.wnids, sorted(images)


@pytest.mark.parametrize("split", ["train", "val"])
def test_archives_shards_and_folders_have_torchvisions_labels(root, split, tmp_path):
    before = sorted(os.listdir(root))
    found = [open_dataset(root, split=split), open_dataset(root / f"ILSVRC2012_img_{split}.tar")]
    words = ["--source", root, "--split", split, "--output", tmp_path / "out", "--workers", "1"]
    assert command("prepare_imagenet")(words) == 0
    found.append(open_dataset(tmp_path / "out"))
    assert sorted(os.listdir(root)) == before

    expected = of_torchvision(root, split)
    assert expected[0] == ["n01440764", "n02012849", "n02100735", "n02119789"]
    # torchvision has unpacked the archives.
    found += [open_dataset(root / split), open_dataset(root, split=split)]
    for dataset in found:
        assert (dataset.classes, content(dataset)) == expected
    (root / f"ILSVRC2012_img_{split}.tar").unlink()
    without_archive = open_dataset(root, split=split)
    assert (without_archive.classes, content(without_archive)) == expected


def test_shards_may_be_written_next_to_the_archives(root):
    words = ["--source", root, "--split", "val", "--output", root / "val", "--workers", "1"]
    assert [command("prepare_imagenet")(words) for _ in range(2)] == [0, 0]
    assert open_dataset(root / "val").classes == open_dataset(root, split="val").classes


def test_unpacked_validation_images_have_the_kits_labels(root, tmp_path):
    with tarfile.open(root / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(tmp_path / "flat" / "val", filter="data")
    os.link(root / DEVKIT, tmp_path / "flat" / DEVKIT)
    flat = open_dataset(tmp_path / "flat" / "val")
    assert (flat.classes, content(flat)) == of_torchvision(root, "val")
    os.unlink(tmp_path / "flat" / "val" / "ILSVRC2012_val_00000003.JPEG")
    with pytest.raises(UserError, match="7 images; expected 8, the number of labels"):
        open_dataset(tmp_path / "flat" / "val")


def test_excluded_images_are_left_out_and_the_others_keep_their_labels(root, tmp_path):
    (tmp_path / "blacklist.txt").write_text("2\nILSVRC2012_val_00000007.JPEG\n")
    every = open_imagenet(root, "val")
    some = open_imagenet(root, "val", exclude=tmp_path / "blacklist.txt")
    kept = [0, 2, 3, 4, 5, 7]
    assert some.names == [every.names[index] for index in kept]
    assert some.labels.tolist() == every.labels[kept].tolist()
    read = [(some.read(index).data, every.read(kept[index]).data) for index in range(6)]
    assert all(a == b for a, b in read)
    (tmp_path / "blacklist.txt").write_text("9\n")
    with pytest.raises(UserError, match="1 images that are not in .*val_00000009"):
        open_imagenet(root, "val", exclude=tmp_path / "blacklist.txt")


def test_missing_and_damaged_files_are_reported(root):
    (root / DEVKIT).write_bytes(b"other")
    with pytest.raises(UserError, match="MD5"):
        open_imagenet(root, "val")
    (root / DEVKIT).unlink()
    with pytest.raises(UserError, match="contains no labels; expected ILSVRC2012_devkit"):
        open_imagenet(root, "val")
    # Training images need no devkit: the names of the nested archives are their classes.
    assert open_imagenet(root, "train").classes[0] == "n01440764"
    archive = root / "ILSVRC2012_img_train.tar"
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(UserError, match="Cannot read archive|truncated"):
        open_imagenet(root, "train")
    archive.unlink()
    with pytest.raises(UserError, match="No train images found"):
        open_imagenet(root, "train")
