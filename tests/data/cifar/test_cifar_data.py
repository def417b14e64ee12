"""Tests for reading CIFAR's official archives and the files prepared from them."""

import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from senet_transfer import UserError
from senet_transfer.data.cifar import archives
from senet_transfer.data.cifar.in_memory import ImageArrays, load_images, save_images, split_file
from senet_transfer.data.cifar.prepare import prepare_cifar, read_source
from tests.data.cifar.cifar_files import (
    CLASSES,
    FORMS,
    expected,
    made_up,
    make_official,
    official_files,
    write_tar,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False])
def test_every_official_format_gives_its_images(form, packed, tmp_path):
    files = official_files(form)
    source = tmp_path / f"{form}.tar.gz"
    if packed:
        write_tar(source, files, folder=form)
    else:
        source = tmp_path / "unpacked"
        (source / form).mkdir(parents=True)
        for name, data in files.items():
            (source / form / name).write_bytes(data)
    splits = read_source(source, verify=False)
    images, labels = expected(form)
    assert list(splits) == ["train", "test"]
    assert splits["train"].classes == CLASSES
    assert torch.equal(splits["train"].images, torch.from_numpy(images))
    assert splits["train"].labels.tolist() == labels.tolist()
    assert torch.equal(splits["test"].images.flatten(1), torch.from_numpy(made_up(5, 9)[0]))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_pickles_of_every_protocol_are_read(protocol, tmp_path):
    files = official_files("cifar-10-python")
    batch = pickle.loads(files["test_batch"])
    files["test_batch"] = pickle.dumps({k.decode(): v for k, v in batch.items()}, protocol)
    splits = read_source(write_tar(tmp_path / "a.tar.gz", files), verify=False)
    assert len(splits["test"]) == 5


@pytest.mark.parametrize("form", FORMS)
def test_the_official_archive_is_recognised_by_its_md5(form, tmp_path, monkeypatch):
    path = write_tar(tmp_path / f"{form}.tar.gz", official_files(form))
    with pytest.raises(UserError, match=f"files of {form}.* MD5 checksum is .*--any-checksum"):
        read_source(path)
    make_official(form, path, monkeypatch)
    with pytest.raises(UserError, match="20 train images; expected 50,000, as in the official"):
        read_source(path)
    monkeypatch.setattr(archives, "IMAGE_COUNTS", {"train": 20, "test": 5})
    assert len(read_source(path)["train"]) == 20


def test_an_unpacked_folder_needs_the_official_number_of_images(tmp_path):
    for name, data in official_files("cifar-10-binary").items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="20 train images; expected 50,000, as in the official"):
        read_source(tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_rejected(form, kept, tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", official_files(form))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(UserError, match="truncated"):
        read_source(path, verify=False)


def broken(form: str, name: str, data: bytes, tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar.gz", {**official_files(form), name: data})


@pytest.mark.parametrize(
    ("form", "name", "words"),
    [
        ("cifar-10-binary", "data_batch_3.bin", "data_batch_3.bin is .* multiple of 3,073"),
        ("cifar-100-binary", "train.bin", "train.bin is .* multiple of 3,074"),
        ("cifar-10-python", "data_batch_3", "Cannot unpickle .*data_batch_3"),
        ("cifar-100-python", "meta", "Cannot unpickle .*meta"),
    ],
)
def test_a_truncated_member_is_rejected(form, name, words, tmp_path):
    data = official_files(form)[name]
    with pytest.raises(UserError, match=words):
        read_source(broken(form, name, data[:-7], tmp_path), verify=False)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_2"])
def test_a_malicious_pickle_is_rejected_and_not_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps({"labels": [1], "data": Evil(), "label_names": CLASSES})
    with pytest.raises(UserError, match=f"{name} was rejected.*No code was executed"):
        read_source(broken("cifar-10-python", name, evil, tmp_path), verify=False)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "batch",
    [
        {"data": np.zeros((4, 3071), np.uint8), "labels": [0] * 4},
        {"data": np.zeros((4, 3072), np.float32), "labels": [0] * 4},
        {"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 3},
        {"data": np.zeros((4, 3072), np.uint8), "labels": ["cat"] * 4},
        {"data": np.zeros((0, 3072), np.uint8), "labels": []},
        {"data": [[0] * 3072], "labels": [0]},
        {"labels": [0]},
        {},
    ],
)
def test_a_pickle_with_wrong_sizes_is_rejected(batch, tmp_path):
    path = broken("cifar-10-python", "test_batch", pickle.dumps(batch, 2), tmp_path)
    with pytest.raises(UserError, match="test_batch contains images of shape"):
        read_source(path, verify=False)


def test_a_label_without_a_class_is_rejected(tmp_path):
    path = broken("cifar-10-binary", "batches.meta.txt", b"cat\ndog\n", tmp_path)
    with pytest.raises(UserError, match="labels from 0 to 2, but 2 classes"):
        read_source(path, verify=False)


# Folders of image files.


def encode(size: tuple[int, int] = (32, 32), shade: int = 0, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, shade if mode == "L" else (shade, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


def tree(folder: Path, names: dict[str, bytes]) -> Path:
    for name, data in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


IMAGES = {
    "ship/b.png": encode(shade=10),
    "cat/a.png": encode(shade=20),
    "ship/a.png": encode(shade=30, mode="L"),
    "ship/notes.txt": b"no image",
}


@pytest.mark.parametrize("form", ["tree", ".tar", ".tar.xz", ".tar.gz"])
def test_one_folder_per_class_is_read_in_the_order_of_names(form, tmp_path):
    for split in ("train", "test"):
        if form == "tree":
            tree(tmp_path / split, IMAGES)
        else:
            write_tar(tmp_path / f"{split}{form}", IMAGES, folder=split)
    data = read_source(tmp_path)["train"]
    assert data.classes == ["cat", "ship"]
    assert data.labels.tolist() == [0, 1, 1]
    assert data.images[:, :, 5, 7].tolist() == [[20, 2, 3], [30, 30, 30], [10, 2, 3]]


def test_an_archive_of_the_current_folder_is_read(tmp_path):
    for split in ("train", "test"):
        tree(tmp_path / "tree" / split, IMAGES)
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(tmp_path / "tree" / split, ".")  # as `tar -C train -cf train.tar .`
            assert archive.getnames()[0] == "."
    data = read_source(tmp_path)["train"]
    assert data.classes == ["cat", "ship"]
    assert data.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"cat/a.png": encode((33, 32))}, "cat/a.png is 33x32 pixels; expected 32x32"),
        ({"cat/a.png": encode()[:60]}, "Cannot decode .*cat/a.png"),
        ({"cat/a.png": b""}, "Cannot decode .*cat/a.png|images are empty .*: cat/a.png"),
        ({"cat/a.txt": b"x"}, "No images found"),
        ({"cat/a.png": encode(), "b.png": encode()}, "images outside of class folders: .*b.png"),
        ({"dog/a.png": encode()}, "splits have different classes.*\\['cat', 'dog'\\]"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_images_with_invalid_sizes_are_rejected(images, words, packed, tmp_path):
    tree(tmp_path / "test", {"cat/a.png": encode()})
    if packed:
        write_tar(tmp_path / "train.tar.xz", images)
    else:
        tree(tmp_path / "train", images)
    with pytest.raises(UserError, match=words):
        read_source(tmp_path)


def test_a_truncated_archive_of_images_is_rejected(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    images = {}
    for number, pixels in enumerate(noise):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        images[f"cat/{number}.png"] = stream.getvalue()
    tree(tmp_path / "test", images)
    path = write_tar(tmp_path / "train.tar.xz", images)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="truncated"):
        read_source(tmp_path)


def test_invalid_sources_are_rejected(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_source(tmp_path / "absent")
    with pytest.raises(UserError, match="expected an official CIFAR-10 or CIFAR-100 archive"):
        read_source(tmp_path)
    with pytest.raises(UserError, match="expected an official CIFAR-10 or CIFAR-100 archive"):
        read_source(write_tar(tmp_path / "a.tar", {"cat/a.png": encode()}))
    (tmp_path / "b.tar.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="not a tar archive"):
        read_source(tmp_path / "b.tar.gz")
    tree(tmp_path / "half" / "train", IMAGES)
    with pytest.raises(UserError, match="contains no test split"):
        read_source(tmp_path / "half")


# The prepared file.


def small(images: int = 7) -> ImageArrays:
    pixels, labels = made_up(images)
    return ImageArrays(
        torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels).long(), CLASSES, "x"
    )


def test_a_prepared_file_returns_the_saved_data(tmp_path):
    data = small()
    path = split_file(tmp_path / "new", "train")
    save_images(data, path, "source")
    found = load_images(path)
    assert torch.equal(found.images, data.images)
    assert torch.equal(found.labels, data.labels)
    assert (found.classes, len(found), found.class_counts()) == (CLASSES, 7, [3, 2, 2])
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o044


@pytest.mark.parametrize("place", [0.001, 0.004, 0.006, 0.008, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_prepared_file_is_rejected(place, damage, tmp_path):
    path = split_file(tmp_path, "train")
    save_images(small(), path, "source")
    content = bytearray(path.read_bytes())
    position = int(len(content) * place)
    if damage == "cut":
        content = content[:position]
    else:
        content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="(?i)prepare the data again|was not written by"):
        load_images(path)


def test_other_files_are_not_prepared_data(tmp_path):
    with pytest.raises(UserError, match="No prepared dataset"):
        load_images(tmp_path / "train.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="contains the tensors .'weight'."):
        load_images(tmp_path / "w.safetensors")


def test_inconsistent_arrays_are_rejected():
    with pytest.raises(UserError, match="expected uint8 images"):
        replace(small(), labels=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(UserError, match="labels from 0 to 2, but 1 classes"):
        replace(small(), classes=["cat"])


def test_preparing_again_keeps_existing_files_and_never_overwrites(tmp_path):
    for split in ("train", "test"):
        tree(tmp_path / "source" / split, IMAGES)
    output = prepare_cifar(tmp_path / "source", tmp_path / "out")
    times = [path.stat().st_mtime_ns for path in sorted(output.iterdir())]
    prepare_cifar(tmp_path / "source", output)
    assert [path.stat().st_mtime_ns for path in sorted(output.iterdir())] == times
    tree(tmp_path / "source" / "test", {"cat/more.png": encode()})
    with pytest.raises(UserError, match="contains a different dataset .3 images"):
        prepare_cifar(tmp_path / "source", output)
    split_file(output, "train").unlink()  # as if preparation had been interrupted
    (tmp_path / "source" / "test" / "cat" / "more.png").unlink()
    prepare_cifar(tmp_path / "source", output)
    assert len(load_images(split_file(output, "train"))) == 3


def test_an_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write"):
        save_images(small(), tmp_path / "file" / "train.safetensors", "source")
