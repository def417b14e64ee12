import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

from senet_transfer.data.images.decode import (
    UPRIGHT,
    BrokenImageError,
    decode_exact,
    decode_fast,
    jpeg_size,
)
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform, put, sample_rng
from senet_transfer.errors import UserError
from tests.data.drawn_places import jpeg

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
def test_both_decoders_give_pillows_pixels(kind):
    expected = np.asarray(Image.open(io.BytesIO(KINDS[kind])).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_exact(KINDS[kind])), expected)
    np.testing.assert_array_equal(decode_fast(KINDS[kind]), expected)


@pytest.mark.long
def test_real_images_decode_equally_with_both_decoders(shared_data):
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
def test_files_other_than_images_are_broken(decode, data):
    with pytest.raises(BrokenImageError):
        decode(data)


@pytest.mark.parametrize("decode", [decode_exact, decode_fast])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.long
def test_an_image_that_would_take_gigabytes_is_broken(decode, kind):
    buffer = io.BytesIO()
    Image.new("1" if kind == "PNG" else "L", (12_000, 12_000)).save(buffer, kind)
    with pytest.raises(BrokenImageError, match="12000x12000"):
        decode(buffer.getvalue())


def test_draft_decoding_keeps_both_sides_at_least_as_long_as_requested():
    large = jpeg(1, (1000, 600))
    assert decode_fast(large).shape == (600, 1000, 3)
    assert decode_fast(large, 140).shape == (150, 250, 3)
    assert decode_fast(large, 151).shape == (300, 500, 3)
    assert decode_fast(large, 301).shape == (600, 1000, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_known_for_jpegs_with_draft_decoding(kind):
    jpegs = {"4:4:4", "4:2:2", "4:2:0", "progressive", "grey"}
    assert jpeg_size(KINDS[kind]) == (PIXELS.shape[:2] if kind in jpegs else None)


def decodings(monkeypatch):
    """Return a list to which the shape of each image decoded by a transform is appended."""
    shapes = []

    def noting(*arguments):
        shapes.append((pixels := decode_fast(*arguments)).shape[:2])
        return pixels

    monkeypatch.setattr("senet_transfer.data.images.transforms.decode_fast", noting)
    return shapes


@pytest.mark.long
def test_draft_decoding_uses_the_smallest_sufficient_scale(monkeypatch):
    data = jpeg(1, (1000, 600))
    exact, draft = TrainTransform(size=64), TrainTransform(size=64, draft=True)
    expected = [exact(data, random.Random(seed)).float() for seed in range(40)]
    shapes = decodings(monkeypatch)
    for seed in range(40):
        *_, height, width = exact.region(600, 1000, random.Random(seed))
        part = max(part for part in (1, 2, 4, 8) if min(height, width) >= 64 * part)
        found = draft(data, random.Random(seed)).float()
        distances = [(found - image).abs().mean() for image in expected]
        assert min(range(40), key=distances.__getitem__) == seed
        assert distances[seed] < 4
        assert shapes[-1] == (600 // part, 1000 // part)
    assert len(set(shapes)) >= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_transformed_as_the_upright_image(orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.open(io.BytesIO(jpeg(1, (400, 240))))
    stored.save(tmp_path / "turned.jpg", exif=exif)
    data = (tmp_path / "turned.jpg").read_bytes()
    plain = default_loader(str(tmp_path / "turned.jpg"))
    np.testing.assert_array_equal(np.asarray(decode_exact(data)), np.asarray(plain))
    buffer = io.BytesIO()
    ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg")).save(buffer, "PNG")
    upright = buffer.getvalue()
    view = EvalTransform(resize=72, crop=64, reading=UPRIGHT)
    assert torch.equal(view(data), EvalTransform(resize=72, crop=64)(upright))
    exact, draft = (TrainTransform(24, draft=draft, reading=UPRIGHT) for draft in (False, True))
    expected = [TrainTransform(24)(upright, random.Random(seed)).float() for seed in range(10)]
    for seed in range(10):
        assert torch.equal(exact(data, random.Random(seed)).float(), expected[seed])
        found = draft(data, random.Random(seed)).float()
        distances = [(found - image).abs().mean() for image in expected]
        assert min(range(10), key=distances.__getitem__) == seed


@pytest.mark.parametrize("kind", ["png", "cmyk", "4:2:0"])
def test_draft_decoding_has_no_effect_without_a_sufficient_scale(kind):
    exact, draft = TrainTransform(size=32), TrainTransform(size=32, draft=True)
    for seed in range(5):
        images = [t(KINDS[kind], random.Random(seed)) for t in (exact, draft)]
        assert torch.equal(*images)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_crop_is_bitwise_equal_to_torchvisions(interpolation):
    data = jpeg(3, (120, 90))
    transform = TrainTransform(size=48, interpolation=interpolation)
    image = torch.from_numpy(decode_fast(data)).permute(2, 0, 1).contiguous()
    for seed in range(20):
        rng = random.Random(seed)
        region = transform.region(90, 120, rng)
        expected = v2.functional.resized_crop(
            image, *region, [48, 48], InterpolationMode(interpolation), antialias=True
        )
        expected = F.hflip(expected) if rng.random() < 0.5 else expected
        assert torch.equal(transform(data, random.Random(seed)), expected)


def test_the_output_of_a_transform_is_not_overwritten_by_the_next():
    whole = TrainTransform(size=45, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    square = [jpeg(seed, (45, 45)) for seed in (1, 2)]
    first = whole(square[0], random.Random(0))
    kept = first.clone()
    whole(square[1], random.Random(0))
    assert torch.equal(first, kept)
    np.testing.assert_array_equal(kept.permute(1, 2, 0), decode_fast(square[0]))


@pytest.mark.parametrize("shape", [(3, 7, 5), (7, 5, 3), (3, 1, 1)])
def test_an_image_of_any_layout_is_collated_unchanged(shape):
    image = torch.randint(0, 255, shape, dtype=torch.uint8)
    image = image.permute(2, 0, 1) if shape[-1] == 3 else image
    batch = torch.zeros(4, *image.shape, dtype=torch.uint8)
    put(image, batch[2])
    assert torch.equal(batch[2], image)
    assert not batch[[0, 1, 3]].any()


def test_ten_crops_are_collated_unchanged():
    images = torch.randint(0, 255, (10, 6, 5, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    batch = torch.zeros(2, 10, 3, 6, 5, dtype=torch.uint8)
    put(images, batch[1])
    assert torch.equal(batch[1], images)


def test_an_image_that_does_not_fit_into_a_batch_is_an_error():
    batch = torch.zeros(2, 3, 6, 5, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"):
        put(torch.ones(5, 6, 3, dtype=torch.uint8).permute(2, 0, 1), batch[0])
    put(torch.ones(6, 5, 3).permute(2, 0, 1), batch[0])
    assert batch[0].all()


def test_regions_are_inside_with_the_requested_area_and_ratio():
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


def test_the_crop_differs_from_pillows_by_at_most_one_level():
    data = jpeg(3, (120, 90))
    transform = TrainTransform(size=48, flip=0.0)
    for seed in range(20):
        top, left, height, width = transform.region(90, 120, random.Random(seed))
        image = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
        expected = F.pil_to_tensor(F.resize(image, [48, 48])).int()
        actual = transform(data, random.Random(seed)).int()
        assert (actual - expected).abs().max() <= 1


@pytest.mark.long
def test_half_of_the_images_are_flipped():
    plain, mirrored = TrainTransform(size=8, flip=0.0), TrainTransform(size=8, flip=1.0)
    usual = TrainTransform(size=8)
    flips = 0
    for seed in range(200):
        images = [t(jpeg(0), random.Random(seed)) for t in (plain, mirrored, usual)]
        assert torch.equal(images[0].flip(-1), images[1])
        flips += torch.equal(images[2], images[1])
    assert 70 < flips < 130


def test_random_numbers_of_a_sample_depend_on_seed_epoch_and_key():
    def first(*arguments):
        return sample_rng(*arguments).random()

    assert first(0, 1, "a") == first(0, 1, "a")
    assert len({first(0, 1, "a"), first(1, 1, "a"), first(0, 2, "a"), first(0, 1, "b")}) == 4


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.5, 1.1)}, {"ratio": (2.0, 1.0)}]
)
def test_an_invalid_crop_is_rejected(wrong):
    with pytest.raises(UserError, match="Invalid crop"):
        TrainTransform(**wrong)
