"""Tests that fast decoding is exact and that fast resizing is close to Detectron2's."""

import io

import numpy as np
import pytest
import simplejpeg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image as detectron2_read_image
from PIL import Image

from senet_transfer.config import get_senet_config
from senet_transfer.data.detection.fast_images import (
    FastResize,
    FastResizeShortestEdge,
    decode_jpeg,
    with_fast_resize,
)
from senet_transfer.data.detection.loader import seeded_rng
from senet_transfer.data.detection.mapper import CheckedDatasetMapper, read_image

ORIENTATION = 274


@pytest.fixture
def jpegs(shared_data):
    return sorted((shared_data / "coco128/train2017").glob("*.jpg"))


@pytest.fixture
def decoded(monkeypatch):
    """Return a list that grows by one element for each image that simplejpeg decodes."""
    found, decode = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args: found.append(0) or decode(*args))
    return found


@pytest.mark.long
def test_all_photographs_have_detectron2s_pixels(jpegs, decoded):
    assert len(jpegs) == 128
    for path, image_format in zip(jpegs, 64 * ["BGR", "RGB"], strict=True):
        expected = detectron2_read_image(str(path), image_format)
        np.testing.assert_array_equal(read_image(str(path), image_format), expected)
    assert len(decoded) == 128


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_turned_photograph_has_detectron2s_pixels(jpegs, tmp_path, decoded, orientation, mode):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = str(tmp_path / "turned.jpg")
    with Image.open(jpegs[0]) as image:
        image.resize((53, 37)).convert(mode).save(path, exif=exif, quality=90)
    expected = detectron2_read_image(path, "BGR")
    np.testing.assert_array_equal(read_image(path, "BGR"), expected)
    assert len(decoded) == (mode != "CMYK")


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_all_kinds_of_jpeg_have_detectron2s_pixels(jpegs, tmp_path, decoded, options):
    path = str(tmp_path / "kind.jpg")
    with Image.open(jpegs[1]) as image:
        image.resize((61, 45)).save(path, **options)
    np.testing.assert_array_equal(read_image(path, "RGB"), detectron2_read_image(path, "RGB"))
    assert decoded


def test_other_files_and_formats_are_left_to_pillow(jpegs):
    data = jpegs[0].read_bytes()
    stored = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stored, "PNG")
    assert decode_jpeg(stored.getvalue(), "BGR") is None
    assert decode_jpeg(data, "L") is None
    assert decode_jpeg(data[: len(data) // 2], "BGR") is None
    assert decode_jpeg(b"", "BGR") is None


@pytest.mark.parametrize("size", [(800, 1066), (640, 641), (700, 1333)])
@pytest.mark.parametrize("image_format", ["BGR", "L"])
def test_enlarged_images_differ_from_pillows_by_at_most_one(jpegs, size, image_format):
    image = read_image(str(jpegs[2]), image_format)
    shape = (*image.shape[:2], *size)
    expected = T.ResizeTransform(*shape, Image.Resampling.BILINEAR).apply_image(image)
    found = FastResize(*shape, Image.Resampling.BILINEAR).apply_image(image)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(300, 400), (800, 200)])
def test_images_that_become_smaller_have_pillows_pixels(jpegs, size):
    image = read_image(str(jpegs[2]), "BGR")
    shape = (*image.shape[:2], *size)
    expected = T.ResizeTransform(*shape, Image.Resampling.BILINEAR).apply_image(image)
    found = FastResize(*shape, Image.Resampling.BILINEAR).apply_image(image)
    np.testing.assert_array_equal(found, expected)


def test_masks_and_other_types_are_resized_by_detectron2():
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    fast = FastResize(6, 8, 9, 12, Image.Resampling.BILINEAR)
    plain = T.ResizeTransform(6, 8, 9, 12, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(fast.apply_segmentation(labels), plain.apply_segmentation(labels))
    numbers = labels[..., None].astype(np.float32)
    np.testing.assert_array_equal(fast.apply_image(numbers), plain.apply_image(numbers))


@pytest.mark.parametrize("style", ["range", "choice"])
def test_fast_resizing_draws_the_same_sizes(style):
    plain = T.ResizeShortestEdge((20, 40), 60, style)
    (fast,) = with_fast_resize([plain])
    image = np.zeros((30, 50, 3), np.uint8)
    for seed in range(5):
        shapes = []
        for augmentation in (plain, fast):
            with seeded_rng(seed):
                found = augmentation.get_transform(image)
            shapes.append((found.new_h, found.new_w))
        assert shapes[0] == shapes[1]


def test_only_training_images_are_resized_fast_and_only_if_the_key_is_set():
    cfg = get_senet_config()

    def kinds(is_train):
        options = CheckedDatasetMapper.from_config(cfg, is_train)
        return [type(augmentation) for augmentation in options["augmentations"]]

    theirs = [type(a) for a in DatasetMapper.from_config(cfg, True)["augmentations"]]
    assert kinds(True) == theirs == [T.ResizeShortestEdge, T.RandomFlip]
    cfg.INPUT.FAST_RESIZE = True
    assert kinds(True) == [FastResizeShortestEdge, T.RandomFlip]
    assert kinds(False) == [T.ResizeShortestEdge]
