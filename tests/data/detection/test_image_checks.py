"""Tests for image checks before a run, and for unreadable images during training."""

import itertools
import logging
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from senet_transfer.cli.data import command
from senet_transfer.config import get_senet_config
from senet_transfer.data.detection import image_checks
from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.image_checks import check_images
from senet_transfer.data.detection.loader import build_test_loader, build_train_loader
from senet_transfer.data.detection.mapper import CheckedDatasetMapper, UnreadableImageError
from senet_transfer.data.images.decode import AS_STORED, Reading
from senet_transfer.errors import UserError

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def damaged(data, files):
    """Return the annotation file and image folder of a dataset with three invalid images."""
    path, images = files(data)
    (images / "a.png").write_bytes(b"<html>")
    Image.new("RGB", (5, 5)).save(images / "b.png")
    Image.fromarray(np.zeros((40, 32), np.float32)).save(images / "sub" / "c.png", "TIFF")
    return path, images


@pytest.mark.parametrize("mode", ["header", "decode"])
def test_all_bad_images_are_in_one_error(mode, damaged):
    path, images = damaged
    register_coco_dataset("mine", path, images)
    with pytest.raises(UserError, match=f"3 of the 3 images listed in {path}") as caught:
        check_images(["mine"], mode=mode)
    message = str(caught.value)
    assert f"{images}/a.png cannot be read: it begins with b'<html>'" in message
    assert f"{images}/b.png (id 3, listed in {path}) is 5x5 pixels" in message
    assert f"{images}/sub/c.png cannot be read: its pixels are floating-point numbers" in message


def test_only_decoding_finds_a_truncated_image(data, files):
    path, images = files(data)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "a.png")
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:-500])
    register_coco_dataset("mine", path, images)
    check_images(["mine"])
    with pytest.raises(UserError, match=r"1 of the 3 images.*\n  .*a\.png cannot be read"):
        check_images(["mine"], mode="decode")


def test_all_threads_read_with_the_same_settings_which_are_restored(data, files, monkeypatch):
    register_coco_dataset("mine", *files(data))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters, seen = list(warnings.filters), set()

    def problem_of(*_):
        seen.add((ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[0][0]))
        return ""

    monkeypatch.setattr(image_checks, "_problem_of", problem_of)
    check_images(["mine"])
    assert seen == {(False, "ignore")}
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert list(warnings.filters) == filters


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_sizes_are_of_the_upright_image(orientation, kind, data, files):
    path, images = files(data)
    exif = Image.Exif()
    exif[274] = orientation
    size = (48, 64) if orientation >= 5 else (64, 48)
    Image.new("RGB", size).save(images / "a.png", kind, exif=exif)
    register_coco_dataset("mine", path, images)
    check_images(["mine"])
    Image.new("RGB", size[::-1]).save(images / "a.png", kind, exif=exif)
    with pytest.raises(UserError, match="1 of the 3 images"):
        check_images(["mine"])
    if kind != "TIFF":  # Pillow always applies the orientation of TIFF files
        Image.new("RGB", (64, 48)).save(images / "a.png", kind, exif=exif)
        check_images(["mine"], reading=AS_STORED)


def test_an_image_that_resizing_would_make_empty_is_named(data, files):
    register_coco_dataset("mine", *files(data))
    check_images(["mine"], max_size=1)
    data["images"][0] |= {"width": 3000, "height": 6}
    for item in data["annotations"]:
        item["bbox"] = [0, 0, 5, 5]
    path, images = files(data, "long.json")
    Image.new("RGB", (3000, 6)).save(images / "a.png")
    register_coco_dataset("mine", path, images)
    check_images(["mine"], max_size=300)
    with pytest.raises(UserError, match=r"a\.png is 3000x6 pixels: resizing the longer side to 96"):
        check_images(["mine"], max_size=96)


@pytest.mark.parametrize(
    ("most", "said"),
    [(700, r"10-bit data, set INPUT.VALUE_RANGE to \[0, 1023\]"), (4095, r"12-bit.*\[0, 4095\]"),
     (16383, r"14-bit.*\[0, 16383\]"), (16384, ""), (65535, "")],
)  # fmt: skip
def test_dark_16_bit_images_are_a_warning(most, said, data, files, caplog):
    path, images = files(data)
    for image in data["images"]:
        pixels = np.full((image["height"], image["width"]), most, np.uint16)
        Image.fromarray(pixels).save(images / image["file_name"])
    register_coco_dataset("mine", path, images)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_images(["mine"])
        check_images(["mine"], reading=Reading((0, most)))
    assert len(caplog.records) == bool(said)
    if said:
        assert pytest.raises(UserError, _raise, caplog.messages[0]).match(said)


def _raise(message):
    raise UserError(message)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "3 of the 3 images"),
        (["--headers-only"], "3 of the 3 images"),
        (["--masks"], "has no `segmentation`"),
        (["--value-range", "0", "1"], "2 of the 3 images"),
        (["--ignore-exif"], "3 of the 3 images"),
    ],
)
def test_the_command_reports_the_same_as_a_run(flags, error, damaged, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["check", *map(str, damaged), "--quiet", *flags])
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


def test_the_command_counts_the_images(data, files, capsys):
    command(["check", *map(str, files(data)), "--quiet"])
    assert "the annotations and 3 images have no errors" in capsys.readouterr().out


# ------------------------------------------------------------- unreadable images in training


@pytest.fixture
def loader(data, files, annotation):
    """Return a function that builds a loader for a dataset whose second image is truncated."""
    for number, image_id in enumerate((3, 5), start=10):
        data["annotations"].append(annotation(number, image_id, 2, [1, 1, 9, 9]))
    path, images = files(data)
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:-40])
    register_coco_dataset("mine", path, images)
    cfg = get_senet_config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN = 3, (32,)
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    def make(*, ratio=0.01, workers=0):
        cfg.DATALOADER.MAX_SKIP_RATIO, cfg.DATALOADER.NUM_WORKERS = ratio, workers
        return build_train_loader(cfg, CheckedDatasetMapper(cfg, is_train=True), seed=1)

    make.cfg = cfg
    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_replaced_with_the_next(workers, loader, caplog):
    batches = list(itertools.islice(loader(workers=workers), 5))
    seen = [image["image_id"] for batch in batches for image in batch]
    assert len(seen) == 15
    assert set(seen) == {5, 7}
    # Records are sorted by id, so image 5 replaces the unreadable image 3 in each epoch.
    assert sorted(seen) == [5] * 10 + [7] * 5
    if not workers:
        # An unreadable image is reported only once.
        (warning,) = [message for message in caplog.messages if "Skipping" in message]
        assert "b.png (id 3" in warning


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_end_training(workers, loader):
    with pytest.raises(UserError, match=r"3 of \d+ images cannot be decoded.*b\.png") as caught:
        list(itertools.islice(loader(ratio=0.0021, workers=workers), 20))
    assert "DATALOADER.MAX_SKIP_RATIO" in str(caught.value)
    assert "senet data check" in str(caught.value)


def test_a_ratio_of_0_makes_an_unreadable_image_an_error(loader):
    with pytest.raises(UnreadableImageError, match=r"b\.png \(id 3.* cannot be read"):
        list(itertools.islice(loader(ratio=0.0), 5))


def test_evaluation_never_skips_an_image(loader):
    cfg = loader.cfg
    cfg.DATALOADER.NUM_WORKERS = 0
    with pytest.raises(UnreadableImageError, match=r"b\.png"):
        list(build_test_loader(cfg, "mine", CheckedDatasetMapper(cfg, is_train=False)))


def test_the_error_of_a_worker_is_preserved():
    error = UnreadableImageError("a.png cannot be read")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (UnreadableImageError, "a.png cannot be read")
