"""Tests for images with any number of channels."""

import io

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageOps

from senet_transfer.data.detection.fast_images import ChannelResize
from senet_transfer.data.images.channels import decode_channels
from senet_transfer.data.images.decode import BrokenImageError, Reading, decode_exact
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform, sample_rng


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def encoded(values: np.ndarray, form: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, form, **options)
    return stream.getvalue()


def pages(values: np.ndarray) -> bytes:
    first, *others = (Image.fromarray(values[..., band]) for band in range(values.shape[2]))
    stream = io.BytesIO()
    first.save(stream, "TIFF", save_all=True, append_images=others)
    return stream.getvalue()


def decoded(data: bytes, channels: int, value_range: tuple[float, ...] = ()) -> np.ndarray:
    return decode_channels(data, Reading(value_range, channels=channels))


@pytest.fixture
def values() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (12, 10, 5)).astype(np.uint8)


def test_values_of_arrays_and_pages_are_unchanged(values):
    assert np.array_equal(decoded(npy(values), 5), values)
    assert np.array_equal(decoded(pages(values), 5), values)
    assert np.array_equal(decoded(npy(values[..., 0]), 1), values[..., :1])
    assert np.array_equal(decoded(encoded(values[..., 0], "PNG"), 1), values[..., :1])
    for count, form in ((3, "PNG"), (4, "PNG"), (3, "TIFF")):
        part = values[..., :count].copy()
        assert np.array_equal(decoded(encoded(part, form), count), part)
    deep = values.astype(np.uint16) * 257
    assert np.array_equal(decoded(pages(deep), 5), values)
    for order in ("<u2", ">u2"):
        assert np.array_equal(decoded(npy(deep.astype(order)), 5), values)
    assert np.array_equal(decoded(encoded(deep[..., 0].copy(), "PNG"), 1), values[..., :1])


def test_tiff_files_with_bands_are_read_by_tifffile(values):
    for contiguous in ("contig", "separate"):
        stream = io.BytesIO()
        stored = values if contiguous == "contig" else values.transpose(2, 0, 1).copy()
        tifffile.imwrite(stream, stored, photometric="minisblack", planarconfig=contiguous)
        assert np.array_equal(decoded(stream.getvalue(), 5), values)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_files_of_every_mode_have_the_values_that_pillow_reads(values, mode, compression):
    stream = io.BytesIO()
    image = Image.fromarray(values[..., :3].copy()).convert(mode)
    image.save(stream, "TIFF", compression=compression)
    expected = np.asarray(image.convert({"P": "RGB", "1": "L"}.get(mode, mode)))
    expected = expected.reshape(12, 10, -1)
    assert np.array_equal(decoded(stream.getvalue(), expected.shape[2]), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_the_orientation_is_applied_only_if_requested(values, form, orientation):
    four = np.ascontiguousarray(values[..., :4])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(four, form, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decoded(data, 4), four)
    assert np.array_equal(decode_channels(data, Reading(upright=True, channels=4)), upright)


def test_the_value_range_is_mapped_to_8_bits():
    values = np.array([[[-1.0, 0.0, 0.5, 1.0, 2.0]]], np.float32)
    expected = [[[0, 0, 128, 255, 255]]]
    assert decoded(npy(values), 5, (0, 1)).tolist() == expected
    counts = (values * 4095).clip(0, 65535).astype(np.uint16)
    assert decoded(npy(counts), 5, (0, 4095)).tolist() == [[[0, 0, 127, 255, 255]]]
    with pytest.raises(BrokenImageError, match=r"float32.*INPUT\.VALUE_RANGE"):
        decoded(npy(values), 5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((4, 4, 3), np.uint8)), r"\(4, 4, 3\); expected \(height, width, 5\)"),
        (npy(np.zeros((4, 4, 3, 5), np.uint8)), r"\(4, 4, 3, 5\)"),
        (npy(np.array([{"a": 1}], object)), "allow_pickle"),
        (npy(np.array([["text"]])), "expected numbers"),
        (npy(np.zeros((9, 9, 5), np.uint8))[:-1], "ValueError|EOF"),
        (npy(np.zeros((9, 9, 5), np.uint8)).replace(b"9, 9", b"9999, 999999"), "."),
        (b"II*\0\x08\0\0\0", "."),
        (b"nothing", "UnidentifiedImageError"),
    ],
)  # fmt: skip
def test_unsupported_data_is_a_broken_image(data, message):
    with pytest.raises(BrokenImageError, match=message):
        decoded(data, 5)


def test_three_channels_are_transformed_as_a_colour_image(values):
    data = encoded(values[..., :3].copy(), "PNG")
    for seed in range(3):
        views = [
            TrainTransform(8, reading=Reading(channels=c))(data, sample_rng(seed, 0, "a"))
            for c in (3, None)
        ]
        assert np.array_equal(*views)
    for mode in ("short_side", "squash", "ten_crop"):
        size = {"mode": mode, "resize": 8, "crop": 6}
        views = [EvalTransform(**size, reading=Reading(channels=c))(data) for c in (3, None)]
        assert views[0].shape == EvalTransform(**size, reading=Reading(channels=3)).output_shape
        assert np.array_equal(*views)
    # Channels are processed independently, so additional channels do not change the first three.
    five = EvalTransform(resize=8, crop=6, reading=Reading(channels=5))(npy(values))
    assert np.array_equal(five[:3], EvalTransform(resize=8, crop=6)(data))


def test_channels_of_a_detectors_image_are_resized_as_grey_images(values):
    found = ChannelResize(12, 10, 30, 20).apply_image(values)
    for band in range(5):
        grey = Image.fromarray(values[..., band]).resize((20, 30), Image.Resampling.BILINEAR)
        assert np.array_equal(found[..., band], np.asarray(grey))


def test_arrays_in_class_folders_are_images_if_there_are_no_others(values, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", values)
    assert open_folder(tmp_path).names == ["a/1.npy", "b/1.npy"]
    (tmp_path / "a" / "1.png").write_bytes(encoded(values[..., 0], "PNG"))
    (tmp_path / "b" / "1.png").write_bytes(encoded(values[..., 0], "PNG"))
    assert open_folder(tmp_path).names == ["a/1.png", "b/1.png"]
    with pytest.raises(BrokenImageError):
        decode_exact(npy(values))
