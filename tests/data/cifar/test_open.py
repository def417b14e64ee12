"""Tests for opening small images in all supported data formats."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from senet_transfer import UserError
from senet_transfer.data.cifar import archives
from senet_transfer.data.cifar.in_memory import ImageArrays, save_images, split_file
from senet_transfer.data.cifar.loader import CifarEvalLoader
from senet_transfer.data.cifar.open import cifar_name, open_cifar
from senet_transfer.data.images.decode import UPRIGHT
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.shards.write import convert
from tests.data.cifar.cifar_files import (
    CLASSES,
    FORMS,
    expected,
    make_official,
    official_files,
    write_tar,
)


@pytest.fixture
def tree(tmp_path):
    """Write four lossless images per class and split, so that pixels can be compared."""
    root = tmp_path / "tree"
    random = np.random.RandomState(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = random.randint(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def pixels(root, split: str) -> list[bytes]:
    paths = sorted((root / split).rglob("*.png"))
    return [np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in paths]


def content(data: ImageArrays) -> list[bytes]:
    return [image.numpy().tobytes() for image in data.images]


def test_the_orientation_is_applied_if_requested(tree, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in tree.rglob("*.png"):
        Image.open(path).save(path, exif=exif)
    expected = []
    for path in sorted((tree / "train").rglob("*.png")):
        upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        expected.append(upright.transpose(2, 0, 1).tobytes())
    for place in (tree, tree / "train"):  # each path uses a different reader
        assert content(open_cifar(place, split="train", reading=UPRIGHT)) == expected
        assert content(open_cifar(place, split="train")) == pixels(tree, "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_tree_its_splits_shards_and_the_prepared_file_give_the_same_images(split, tree, tmp_path):
    convert(open_folder(tree / split), tmp_path / "shards", split=split, shard_mb=0.01)
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    places = [tree, tree / split, tmp_path / "shards"]
    found = [open_cifar(place, split=split) for place in places]
    save_images(found[0], split_file(tmp_path / "prepared", split), "drawn")
    places = [split_file(tmp_path / "prepared", split), tmp_path / "prepared"]
    found += [open_cifar(place, split=split) for place in places]
    for data in found:
        assert list(data.classes) == CLASSES
        pairs = sorted(zip(content(data), data.labels.tolist(), strict=True))
        expected = zip(pixels(tree, split), [0] * 4 + [1] * 4 + [2] * 4, strict=True)
        assert pairs == sorted(expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False])
def test_official_data_is_read_unchanged(form, packed, tmp_path, monkeypatch):
    path = write_tar(tmp_path / f"{form}.tar.gz", official_files(form))
    make_official(form, path, monkeypatch)
    monkeypatch.setattr(archives, "IMAGE_COUNTS", {"train": 20, "test": 5})
    if not packed:
        path = tmp_path / "unpacked"
        path.mkdir()
        for name, data in official_files(form).items():
            (path / name).write_bytes(data)
    images, labels = expected(form)
    found = open_cifar(path, split="train")
    assert torch.equal(found.images, torch.from_numpy(images))
    assert found.labels.tolist() == labels.tolist()
    assert len(open_cifar(path, split="test", classes=CLASSES)) == 5


def test_larger_images_are_transformed_as_in_evaluation(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("RGB", (90, 64), (10, 20, 30)).save(tmp_path / "only" / "a.png")
    found = open_cifar(tmp_path, split="test")
    assert found.images.shape == (1, 3, 32, 32)
    assert found.images.float().mean((0, 2, 3)).tolist() == [10, 20, 30]


def test_other_classes_are_rejected(tree):
    with pytest.raises(UserError, match="1 folders .* not among the 3 expected classes: ship"):
        open_cifar(tree, split="test", classes=["dog", "cat", "plane"])


@pytest.mark.parametrize("packed", [True, False])
def test_a_tree_is_listed_as_a_folder_of_larger_images(tree, tmp_path, packed):
    def opened(**options):
        root = tree
        if packed:
            root = tmp_path / "packed"
            root.mkdir(exist_ok=True)
            with tarfile.open(root / "test.tar", "w") as tar:
                tar.add(tree / "test", "any/test")
        return open_cifar(root, split="test", **options)

    (tree / "test" / "empty").mkdir()
    with pytest.raises(UserError, match=r"1 folders .* contain no images: empty"):
        opened()
    assert len(opened(classes=[*CLASSES, "empty"])) == 12
    # A folder named like an image is a class folder.
    (tree / "test" / "empty").rename(tree / "test" / "dog" / "x.png")
    with pytest.raises(UserError, match="1 folders .* contain no images: dog/x.png"):
        opened()
    Image.new("RGB", (32, 32)).save(tree / "test" / "dog" / "x.png" / "0.png")
    found = opened()
    assert (
        found.classes == open_folder(tree / "test").classes == ["cat", "dog", "dog/x.png", "ship"]
    )
    assert found.labels.tolist() == open_folder(tree / "test").labels.tolist()
    Image.new("RGB", (32, 32)).save(tree / "test" / "stray.png")
    with pytest.raises(UserError, match="images outside of class folders: .*stray.png"):
        opened()


def test_a_broken_link_in_a_tree_is_named(tree):
    (tree / "test" / "dog" / "7.png").symlink_to("missing.png")
    with pytest.raises(UserError, match="1 of 13 listed images are empty or missing .*dog/7.png"):
        open_cifar(tree, split="test")


def test_predictions_have_the_paths_of_the_images(tree):
    expected = [str(path) for path in sorted((tree / "test").rglob("*.png"))]
    for place in (tree, tree / "test"):
        (batch,) = CifarEvalLoader(open_cifar(place, split="test"), batch_size=12)
        assert batch["path"] == expected


def test_folders_are_labelled_in_the_order_of_the_expected_classes(tree):
    found = open_cifar(tree, split="test", classes=["dog", "cat", "ship"])
    assert found.classes == ["dog", "cat", "ship"]
    assert found.labels.tolist() == [1] * 4 + [0] * 4 + [2] * 4


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"Cannot decode .*broken"):
        open_cifar(tmp_path, split="test")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cifar10_test", "cifar10"),
        ("/data/cifar100/test.safetensors", "cifar100"),
        ("/data/mycifar10/test.safetensors", None),
        ("flowers/test", None),
    ],
)
def test_cifar_is_found_by_name_and_path(dataset, expected):
    assert cifar_name(dataset) == expected
