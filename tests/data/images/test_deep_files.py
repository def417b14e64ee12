"""Tests for reading image files with more than 8 bits per channel."""

import io
import runpy
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from senet_transfer.data.images.channels import decode_channels
from senet_transfer.data.images.decode import BrokenImageError, Reading, decode_exact, decode_fast

pytest.importorskip("onnxruntime")
TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "onnx_images.py"))
SIDE = 32
GREY = np.linspace(0, 4095, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
RGB = np.stack([GREY, GREY[::-1], GREY.T], 2)
RANGE = (0, 4095)
SCALED = np.rint(RGB / 4095 * 255)
SCALED_GREY = np.rint(np.stack([GREY] * 3, 2) / 4095 * 255)


def pnm(magic: str, values: np.ndarray) -> bytes:
    """Encode values from 0 to 4095 as PGM (P5, P2) or PPM (P6, P3)."""
    head = f"{magic} {SIDE} {SIDE} 4095\n".encode()
    if magic in ("P2", "P3"):
        return head + " ".join(map(str, values.ravel())).encode() + b"\n"
    return head + values.astype(">u2").tobytes()


def tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    if options.get("planarconfig") == "separate":
        values = np.moveaxis(values, 2, 0).copy()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """Encode values as a grayscale TIFF file with 12 bits per value, without padding bits."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(SIDE, SIDE, 2), axis=2)
    data = np.packbits(bits[:, :, 4:].reshape(SIDE, -1), axis=1).tobytes()
    tags = {256: SIDE, 257: SIDE, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: SIDE}
    tags[279] = len(data)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    return head + data


def jpeg2000(values: np.ndarray, bits: int) -> bytes:
    """Encode values as a lossless JPEG 2000 image with 16 or 12 bits per channel."""
    shift = (1 << 15) - (1 << bits - 1)  # The decoder subtracts half of the range.
    lossless = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    stored = values if values.ndim == 2 else values[:, :, ::-1]
    data = bytearray(cv2.imencode(".jp2", stored + np.uint16(shift), lossless)[1].tobytes())
    start = data.index(b"\xff\x4f\xff\x51")
    for channel in range(data[start + 41]):
        data[start + 42 + 3 * channel] = bits - 1
    data[data.index(b"ihdr") + 14] = bits - 1
    return bytes(data)


def sgi(values: np.ndarray) -> bytes:
    planes = values.reshape(SIDE, SIDE, -1)[::-1].transpose(2, 0, 1)
    sizes = (2 if len(planes) == 1 else 3, SIDE, SIDE, len(planes), 0, 65535)
    head = struct.pack(">HBBHHHHII", 474, 0, 2, *sizes)
    return head.ljust(512, b"\0") + planes.astype(">u2").tobytes()


FILES = {
    "P5": (pnm("P5", GREY), SCALED_GREY),
    "P2": (pnm("P2", GREY), SCALED_GREY),
    "P6": (pnm("P6", RGB), SCALED),
    "P3": (pnm("P3", RGB), SCALED),
    "jpeg 2000, grey": (jpeg2000(GREY, 16), SCALED_GREY),
    "jpeg 2000, 12 bits, grey": (jpeg2000(GREY, 12), SCALED_GREY),
    "jpeg 2000": (jpeg2000(RGB, 16), SCALED),
    "jpeg 2000, 12 bits": (jpeg2000(RGB, 12), SCALED),
    "lzma": (tiff(RGB, photometric="rgb", compression="lzma"), SCALED),
    "predictor": (tiff(RGB, photometric="rgb", compression="zlib", predictor=True), SCALED),
    "big-endian": (tiff(RGB, photometric="rgb", byteorder=">"), SCALED),
    "planes": (tiff(RGB, photometric="rgb", planarconfig="separate"), SCALED),
    "zipped planes": (
        tiff(RGB, photometric="rgb", planarconfig="separate", compression="zlib"), SCALED
    ),
    "turned": (
        tiff(RGB, photometric="rgb", extratags=[(274, "H", 1, 6, True)]), np.rot90(SCALED, -1)
    ),
    "12 bits": (tiff_of_12_bits(GREY), SCALED_GREY),
    "white is zero": (tiff(GREY, photometric="miniswhite"), 255 - SCALED_GREY),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_value_range_applies_to_the_stored_values(name, tmp_path):
    data, expected = FILES[name]
    for decode in (decode_exact, decode_fast):
        np.testing.assert_array_equal(decode(data, reading=Reading(RANGE)), expected)
    path = tmp_path / "image"
    path.write_bytes(data)
    if name in ("P5", "P2", "jpeg 2000, grey", "12 bits", "white is zero"):
        np.testing.assert_array_equal(TOOL["read_image"](str(path), RANGE).convert("RGB"), expected)
    else:
        with pytest.raises(SystemExit, match="more than 8 bits per channel|separate planes"):
            TOOL["read_image"](str(path), RANGE)


@pytest.mark.parametrize("values", [GREY, RGB])
def test_a_value_range_that_cannot_be_applied_is_an_error(values, tmp_path):
    path = tmp_path / "image.sgi"
    path.write_bytes(sgi(values))
    with pytest.raises(BrokenImageError, match="SGI file with more than 8 bits .* convert"):
        decode_exact(path.read_bytes(), Reading(RANGE))
    with pytest.raises(SystemExit, match="value range can't be applied"):
        TOOL["read_image"](str(path), RANGE)
    # Without a range, Pillow keeps the upper 8 bits.
    expected = (values if values.ndim == 3 else np.stack([values] * 3, 2)) >> 8
    np.testing.assert_array_equal(decode_exact(path.read_bytes()), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("12 bits", SCALED_GREY),
        ("P5", SCALED_GREY),
        ("white is zero", 255 - np.rint(np.stack([GREY] * 3, 2) / 257)),
        ("planes", RGB >> 8),
        ("zipped planes", RGB >> 8),
        ("lzma", RGB >> 8),
    ],
)
def test_files_without_a_value_range_have_the_range_that_they_state(name, expected, tmp_path):
    data = FILES[name][0]
    for decode in (decode_exact, decode_fast):
        np.testing.assert_array_equal(decode(data), expected)
    (tmp_path / "image").write_bytes(data)
    if "planes" in name:
        with pytest.raises(SystemExit, match="separate planes"):
            TOOL["read_image"](str(tmp_path / "image"))
        return
    found = TOOL["read_image"](str(tmp_path / "image")).convert("RGB")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["P5", "P6", "jpeg 2000, 12 bits, grey", "jpeg 2000, 12 bits"])
def test_channels_have_the_same_values(name):
    data, expected = FILES[name]
    channels = 1 if (expected == expected[:, :, :1]).all() else 3
    found = decode_channels(data, Reading(RANGE, channels=channels))
    np.testing.assert_array_equal(found, expected[:, :, :channels])


def test_truncated_files_are_rejected():
    for data in (cv2.imencode(".png", RGB)[1].tobytes(), FILES["lzma"][0], FILES["P6"][0]):
        with pytest.raises(BrokenImageError):
            decode_exact(data[:-200], Reading(RANGE))


def test_colours_with_8_bits_are_not_changed():
    image = Image.fromarray(SCALED.astype(np.uint8))
    for form in ("PNG", "TIFF", "JPEG2000", "SGI", "PPM", "BMP"):
        buffer = io.BytesIO()
        image.save(buffer, form)
        np.testing.assert_array_equal(decode_exact(buffer.getvalue(), Reading(RANGE)), SCALED)
