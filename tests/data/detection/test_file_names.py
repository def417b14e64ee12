"""Tests for annotation files in which image names are spelled differently than on disk."""

import unicodedata

import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.crops import CocoCrops
from senet_transfer.errors import UserError

pytestmark = pytest.mark.usefixtures("catalogs")

NFC, NFD = (unicodedata.normalize(form, "Küche/Straßé 1.png") for form in ("NFC", "NFD"))
MIXED = unicodedata.normalize("NFD", "Küche") + "/" + unicodedata.normalize("NFC", "Straßé 1.png")


def place(images, name):
    path = images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 40)).save(path)
    return path


@pytest.mark.parametrize(
    ("listed", "existing"),
    [
        ("sub\\d.png", "sub/d.png"),
        ("sub/my%20image.png", "sub/my image.png"),
        ("my%20dir\\d%C3%A4.png", "my dir/dä.png"),
        (NFC, NFD),
        (NFD, NFC),
        (NFC, MIXED),
        (NFD.replace("/", "\\"), MIXED),
    ],
)
def test_another_spelling_of_the_same_name_is_read(listed, existing, data, files, caplog):
    data["images"][1]["file_name"] = listed
    path, images = files(data)
    expected = place(images, existing)
    register_coco_dataset("mine", path, images)
    assert "1 of the 3 file_names are spelled differently" in caplog.text
    record = next(r for r in DatasetCatalog.get("mine") if r["image_id"] == 3)
    assert record["file_name"] == str(expected)
    assert str(expected) in [r["file_name"] for r in DatasetCatalog["mine"].image_records()]
    assert existing in CocoCrops(path, images).files.values()


@pytest.mark.parametrize("name", ["a%20b.png", "c\\d.png"])
def test_a_file_of_the_listed_name_is_preferred(name, data, files):
    data["images"][1]["file_name"] = name
    path, images = files(data)
    for each in ("a b.png", "c/d.png", name):
        place(images, each)
    register_coco_dataset("mine", path, images)
    record = next(r for r in DatasetCatalog.get("mine") if r["image_id"] == 3)
    assert record["file_name"] == str(images / name)


@pytest.mark.parametrize(
    ("listed", "existing", "difference"),
    [
        ("Photo.png", "photo.PNG", "upper and lower case"),
        ("SUB/d.png", "sub/d.png", "upper and lower case"),
        (" d.png", "d.png", "upper and lower case"),
        ("d.jpg", "d.png", "the file extension"),
        ("d", "d.png", "the file extension"),
        ("train/d.png", "val/d.png", "in another folder"),
        ("train/d.JPG", "val/D.png", "upper and lower case or the file extension"),
    ],
)
def test_a_near_match_is_offered(listed, existing, difference, data, files):
    data["images"][1]["file_name"] = listed
    path, images = files(data)
    place(images, existing)
    with pytest.raises(UserError, match="1 of the 3 images") as caught:
        register_coco_dataset("mine", path, images)
    assert f"{existing!r} for {listed!r}" in str(caught.value)
    assert difference in str(caught.value)


@pytest.mark.parametrize("name", ["..%2Fout.png", "%2e%2e/out.png", "sub%5C..%5C..%5Cout.png"])
def test_an_encoded_path_does_not_leave_the_folder(name, data, files):
    data["images"][1]["file_name"] = name
    path, images = files(data)
    place(images.parent, "out.png")
    with pytest.raises(UserError, match="1 of the 3 images"):
        register_coco_dataset("mine", path, images)
