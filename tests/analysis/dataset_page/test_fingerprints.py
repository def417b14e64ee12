"""Tests for finding duplicate and near-duplicate images."""

import io
import shutil

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageEnhance

from senet_transfer.analysis.dataset_page.cards import duplicates_card, unusual_card
from senet_transfer.analysis.dataset_page.fingerprints import (
    DISTANCE,
    find_duplicates,
    fingerprint_images,
    near_pairs,
)
from senet_transfer.analysis.dataset_page.splits import ImageFiles, Split
from senet_transfer.analysis.dataset_page.unusual import Unusual
from senet_transfer.data.images.decode import Reading


def groups(files, **options):
    found = fingerprint_images(ImageFiles(files, "files"), limit=999, workers=1, **options)
    duplicates = find_duplicates(found.digests, found.bits, found.contrast)
    return found, [(group.members, group.identical) for group in duplicates]


def test_near_pairs_equal_those_of_brute_force():
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (360, 256), dtype=np.uint8)
    for index in range(60):  # pairs that differ in 0 to 59 bits
        bits[300 + index] = bits[index]
        bits[300 + index, :index] ^= 1
    hashes = np.packbits(bits, axis=1).view(np.uint64)
    different = (bits[:, None] != bits[None]).sum(2)
    expected = np.argwhere(np.triu(different <= DISTANCE, 1))
    found = near_pairs(hashes)
    assert found.tolist() == expected.tolist()
    assert len(found) == DISTANCE + 1


def test_copies_are_found_and_different_images_are_not(tmp_path):
    random = np.random.default_rng(0)

    def drawn():
        pixels = random.integers(0, 255, (15, 20, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC)

    def jpeg(image, quality=90):
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=quality)
        return stored.getvalue()

    first, second = drawn(), drawn()
    grey, white = (Image.new("RGB", (64, 64), (value,) * 3) for value in (128, 255))
    contents = {
        "a": jpeg(first),
        "b": jpeg(first, 40),
        "c": jpeg(first.resize((120, 90))),
        "d": jpeg(ImageEnhance.Brightness(first).enhance(0.8)),
        "e": jpeg(first.crop((4, 3, 316, 237))),
        "f": jpeg(second),
        "g": jpeg(second),
        "h": jpeg(drawn()),
        # Images without contrast have no reliable hash and are not grouped.
        "i": jpeg(grey),
        "j": jpeg(white),
        "k": b"\xff\xd8 broken",
    }
    files = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        files.append(str(tmp_path / name))
    found, duplicates = groups(files)
    assert duplicates == [([0, 1, 2, 3, 4], False), ([5, 6], True)]
    assert found.sizes[:3].tolist() == [[320, 240], [320, 240], [120, 90]]
    assert [path for path, _ in found.broken] == [str(tmp_path / "k")]
    assert found.index.tolist() == list(range(10))


def test_the_size_is_of_the_image_that_is_used(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    path = str(tmp_path / "turned.jpg")
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    for reading, size in ((Reading(), [60, 40]), (Reading(upright=True), [40, 60])):
        assert groups([path], reading=reading)[0].sizes.tolist() == [size]


@pytest.mark.long
def test_processes_find_the_same_copies_and_a_limit_takes_a_sample(tree):
    files = sorted(map(str, tree.rglob("*.png")))
    images = ImageFiles(files, "files")
    one, two = (fingerprint_images(images, limit=99, workers=workers) for workers in (1, 2))
    for key in ("index", "digests", "bits", "sizes", "contrast"):
        assert np.array_equal(getattr(one, key), getattr(two, key))
    few = fingerprint_images(images, limit=4, workers=1)
    assert len(few.index) == 4
    assert np.array_equal(few.digests, one.digests[few.index])


@pytest.mark.long
def test_the_copy_in_the_published_blood_cells_is_found(shared_data):
    # The dataset contains two photographs of the same cells. One of them is in its training list
    # and the other one in its validation list.
    names = [f"BloodImage_{number:05d}.jpg" for number in range(30, 60)]
    folder = shared_data / "bccd" / "JPEGImages"
    files = [str(folder / name) for name in names if (folder / name).exists()]
    _, duplicates = groups(files)
    shown = [[files[member][-9:-4] for member in members] for members, _ in duplicates]
    assert shown == [["00037", "00038"]]


def test_copies_of_images_with_five_channels_are_found_and_shown(tmp_path):
    random = np.random.default_rng(0)
    files = []
    for name in "abc":
        # Large squares of random brightness are more like photographs than noise is.
        coarse = random.integers(0, 256, (6, 8, 5), np.uint8)
        files.append(str(tmp_path / f"{name}.npy"))
        np.save(files[-1], coarse.repeat(10, axis=0).repeat(10, axis=1))
    files.append(str(tmp_path / "d.npy"))
    shutil.copy(files[0], files[-1])
    found, duplicates = groups(files, reading=Reading(channels=5))
    assert found.broken == []
    assert found.sizes.tolist() == [[80, 60]] * 4
    assert duplicates == [([0, 3], True)]
    split = Split("name", "training data", True, (), ImageFiles(files, "files"), files)
    card = duplicates_card([(split, 0), (split, 3)], identical=True, reading=Reading(channels=5))
    assert [member["name"] for member in card["members"]] == [
        "training data: a.npy",
        "training data: d.npy",
    ]
    item = Unusual("blank", 0.0, 1, (), "It is blank.")
    picture = unusual_card(split, item, Reading(channels=5))["picture"]
    assert picture["caption"] == "whole image, 80 x 60 pixels"
