import io
import math
import random

import numpy as np
import pytest
import torch
from drawn_places import jpeg
from PIL import Image
from torchvision.transforms import functional as F

from senet_transfer.data.augment import TrainTransform, sample_rng
from senet_transfer.data.decode import BrokenImageError, decode_exact, decode_fast
from senet_transfer.errors import UserError

PIXELS = np.asarray(Image.open(io.BytesIO(jpeg(5, (67, 45)))))


def encoded(mode="RGB", kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


KINDS = {
    "4:4:4": encoded(subsampling="4:4:4"),
    "4:2:2": encoded(subsampling="4:2:2"),
    "4:2:0": encoded(subsampling="4:2:0"),
    "progressive": encoded(progressive=True),
    "grey": encoded("L"),
    "cmyk": encoded("CMYK"),
    "png": encoded(kind="PNG"),
    "palette": encoded("P", kind="PNG"),
    "transparent": encoded("RGBA", kind="PNG"),
    "grey png": encoded("L", kind="PNG"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_give_the_pixels_of_plain_pillow(kind):
    expected = np.asarray(Image.open(io.BytesIO(KINDS[kind])).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_exact(KINDS[kind])), expected)
    np.testing.assert_array_equal(decode_fast(KINDS[kind]), expected)


def test_real_images_decode_alike_fast_and_exactly(shared_data):
    paths = sorted((shared_data / "mini_places365").rglob("*.jpg"))
    for path in paths[::10]:
        data = path.read_bytes()
        np.testing.assert_array_equal(decode_fast(data), np.asarray(decode_exact(data)))


@pytest.mark.parametrize("decode", [decode_exact, decode_fast])
@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "png", "cmyk"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_images_are_broken(decode, kind, share):
    data = KINDS[kind]
    with pytest.raises(BrokenImageError):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("decode", [decode_exact, decode_fast])
@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 99]
)
def test_what_is_no_image_is_broken(decode, data):
    with pytest.raises(BrokenImageError):
        decode(data)


@pytest.mark.parametrize("decode", [decode_exact, decode_fast])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_that_asks_for_gigabytes_is_broken(decode, kind):
    buffer = io.BytesIO()
    Image.new("1" if kind == "PNG" else "L", (12_000, 12_000)).save(buffer, kind)
    with pytest.raises(BrokenImageError, match="12000x12000"):
        decode(buffer.getvalue())


def test_draft_decoding_keeps_both_sides_at_least_as_long_as_asked():
    large = jpeg(1, (1000, 600))
    assert decode_fast(large).shape == (600, 1000, 3)
    assert decode_fast(large, 140).shape == (150, 250, 3)
    assert decode_fast(large, 151).shape[0] >= 151


def test_regions_are_inside_and_as_large_and_long_as_asked():
    transform = TrainTransform(scale=(0.2, 0.9), ratio=(0.5, 2.0))
    rng = random.Random(0)
    areas, aspects = [], []
    for _ in range(3000):
        top, left, height, width = transform.region(200, 300, rng)
        assert 0 <= top <= 200 - height
        assert 0 <= left <= 300 - width
        areas.append(height * width / 60_000)
        aspects.append(math.log(width / height))
    assert 0.19 < min(areas) < 0.22
    assert max(areas) < 0.91
    assert -0.72 < min(aspects) < -0.65
    assert 0.65 < max(aspects) < 0.72


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (3, 2)])
def test_images_of_any_shape_give_a_square(size):
    image = TrainTransform(size=32)(jpeg(0, size), random.Random(0))
    assert image.shape == (3, 32, 32)


def test_the_crop_differs_from_pillows_by_a_grey_level_at_most():
    data = jpeg(3, (120, 90))
    transform = TrainTransform(size=48, flip=0.0)
    for seed in range(20):
        top, left, height, width = transform.region(90, 120, random.Random(seed))
        image = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
        expected = F.pil_to_tensor(F.resize(image, [48, 48])).int()
        actual = transform(data, random.Random(seed)).int()
        assert (actual - expected).abs().max() <= 1


def test_half_of_the_images_are_flipped():
    plain, mirrored = TrainTransform(size=8, flip=0.0), TrainTransform(size=8, flip=1.0)
    usual = TrainTransform(size=8)
    flips = 0
    for seed in range(200):
        images = [t(jpeg(0), random.Random(seed)) for t in (plain, mirrored, usual)]
        assert torch.equal(images[0].flip(-1), images[1])
        flips += torch.equal(images[2], images[1])
    assert 70 < flips < 130


def test_random_numbers_of_a_sample_follow_from_seed_epoch_and_key():
    def first(*arguments):
        return sample_rng(*arguments).random()

    assert first(0, 1, "a") == first(0, 1, "a")
    assert len({first(0, 1, "a"), first(1, 1, "a"), first(0, 2, "a"), first(0, 1, "b")}) == 4


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.5, 1.1)}, {"ratio": (2.0, 1.0)}]
)
def test_a_crop_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UserError, match="cannot crop"):
        TrainTransform(**wrong)
