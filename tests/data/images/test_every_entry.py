"""Tests that training, evaluation, prediction and other code decode image files identically."""

import base64
import functools
import io
import random
import runpy
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps

from senet_transfer import UserError
from senet_transfer.analysis.report.classification import pictures
from senet_transfer.config.load import load_config
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.mapper import read_image
from senet_transfer.data.images.decode import BrokenImageError, allowed_formats, decode_exact
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform
from senet_transfer.data.reading import reading_of
from senet_transfer.data.shards.write import convert
from senet_transfer.engine.predictor.inputs import Photo

pytest.importorskip("onnxruntime")
TOOLS = Path(__file__).parents[3] / "tools"
SCRIPT = runpy.run_path(str(TOOLS / "classify_onnx.py"))
SIDE = 16
REJECTED = "rejected"
RAMP = np.add.outer(np.arange(SIDE), np.arange(SIDE)) * 2000
GREY16 = RAMP.astype(np.uint16)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], 2)
RGB = Image.fromarray((COLOUR // 257).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """Encode an image with Pillow in the given format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def deep(suffix: str) -> bytes:
    """Encode the 16-bit colour test image with OpenCV, in the format given by a file extension."""
    return cv2.imencode(suffix, COLOUR[:, :, ::-1].astype(np.uint16))[1].tobytes()


def transparent() -> Image.Image:
    """Return the test image with a non-constant alpha channel."""
    image = RGB.copy()
    image.putalpha(Image.fromarray((RAMP // 257).astype(np.uint8)))
    return image


@functools.cache
def files() -> dict[str, bytes]:
    """Return encoded images of different formats and modes, keyed by file name."""
    jpeg = encoded(RGB, "JPEG", quality=95)
    whole = {
        "rgb.jpg": jpeg,
        "progressive.jpg": encoded(RGB, "JPEG", progressive=True),
        "grey.jpg": encoded(RGB.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
        "damaged_exif.jpg": encoded(RGB, "JPEG", exif=b"Exif\0\0damaged"),
        "trailing.jpg": jpeg + b"junk" * 10,
        "rgb.jfif": jpeg,
        "png_named.jpg": encoded(RGB, "PNG"),
        "rgb.png": encoded(RGB, "PNG"),
        "palette.png": encoded(RGB.quantize(16), "PNG"),
        "transparent_palette.png": encoded(RGB.quantize(16), "PNG", transparency=3),
        "la.png": encoded(transparent().convert("LA"), "PNG"),
        "rgba.png": encoded(transparent(), "PNG"),
        "one_bit.png": encoded(RGB.convert("1"), "PNG"),
        "rgb.webp": encoded(RGB, "WEBP", lossless=True),
        "alpha.webp": encoded(transparent(), "WEBP", lossless=True),
        "animated.gif": encoded(
            RGB.quantize(16), "GIF", save_all=True, append_images=[RGB.rotate(90).quantize(16)]
        ),
        "lab.tif": encoded(RGB.convert("LAB"), "TIFF"),
        "cmyk.tif": encoded(RGB.convert("CMYK"), "TIFF"),
        "one_bit.tif": encoded(RGB.convert("1"), "TIFF"),
        "grey16.png": encoded(Image.fromarray(GREY16), "PNG"),
        "grey16.tif": encoded(Image.fromarray(GREY16), "TIFF"),
        "grey16.pgm": encoded(Image.fromarray(GREY16), "PPM"),
        "int32.tif": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        "float.tif": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        "rgb16.png": deep(".png"),
        "rgb16.ppm": deep(".ppm"),
        "rgb16.tif": deep(".tif"),
    }
    for suffix, form in {".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF", ".tga": "TGA"}.items():
        whole[f"rgb{suffix}"] = encoded(RGB, form)
    turned = {}
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for suffix, form in {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP"}.items():
            turned[f"turned{orientation}.{suffix}"] = encoded(RGB, form, exif=exif)
        # Pillow can't write 16-bit colour images, so insert the EXIF chunk by hand.
        at, chunk = whole["rgb16.png"].index(b"IDAT") - 4, b"eXIf" + exif.tobytes()[6:]
        chunk = len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        turned[f"rgb16.{orientation}.png"] = deep(".png")[:at] + chunk + deep(".png")[at:]
    broken = {
        "truncated.jpg": jpeg[:-60],
        "truncated.png": whole["rgb.png"][:-60],
        "truncated.webp": whole["rgb.webp"][:-20],
        "html.jpg": b"<!DOCTYPE html><title>404</title>",
        "drawing.jpg": encoded(RGB, "EPS"),
        "document.jpg": encoded(RGB, "PDF"),
    }
    return whole | turned | broken


def by_entry(
    folder: Path, value_range: tuple[float, ...], exif: str
) -> dict[str, Callable[[str], object]]:
    """Return functions that read an image, keyed by the use of the image, such as "train".

    Each function takes a file name in ``images/c``, and returns the pixels read for this use.
    """
    c = folder / "images" / "c"
    options = ["INPUT.VALUE_RANGE", str(value_range), "INPUT.EXIF", exif]
    cfg = load_config("configs/base/classification.yaml", options)
    detector = reading_of(load_config("configs/finetune_detector.yaml", options))
    reading = reading_of(cfg)
    train = TrainTransform(SIDE, (1, 1), (1, 1), flip=0, draft=True, reading=reading)
    evaluate = EvalTransform("short_side", SIDE, SIDE, reading=reading)
    preprocessing = {"resize": SIDE, "interpolation": "bilinear"}
    cfg.DATASETS.TEST = (str(folder / "images"),)
    images = open_folder(folder / "images")
    places = {Path(name).name: place for place, name in enumerate(images.names)}
    shards = open_dataset(folder / "shards")
    stored = {shards.read_sample(index).data for index in range(len(shards))}

    def shown(name: str) -> np.ndarray:
        found = pictures(cfg, cfg.DATASETS.TEST[0], [places[name]], lambda _: None, quiet=True)
        if not found:
            raise BrokenImageError(name)
        (text,) = found.values()
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))))

    def prepared(name: str) -> object:
        data = (c / name).read_bytes()
        if data not in stored:
            raise BrokenImageError(name)
        return evaluate(data).permute(1, 2, 0)

    return {
        "train": lambda name: train((c / name).read_bytes(), random.Random(0)).permute(1, 2, 0),
        "evaluate": lambda name: evaluate((c / name).read_bytes()).permute(1, 2, 0),
        "predict": lambda name: Photo(str(c / name), reading=reading).pillow(),
        "prepare": prepared,
        "onnx": lambda name: SCRIPT["load"](
            str(c / name),
            preprocessing,
            (SIDE, SIDE),
            value_range=value_range,
            upright=reading.upright,
        )[0].transpose(1, 2, 0),
        "report": shown,
        "train a detector": lambda name: read_image(str(c / name), "BGR", detector)[:, :, ::-1],
        "predict with a detector": lambda name: Photo(str(c / name), reading=detector).pixels(),
    }


def expected(name: str, value_range: tuple[float, ...], upright: bool) -> np.ndarray | str:
    """Return the pixels expected from reading a file, or REJECTED if an error is expected.

    The expected pixels of an 8-bit image are those that Pillow decodes. The values of deeper images
    are scaled from the value range to 0-255. Without a value range, 16-bit grayscale images are
    scaled from 0-65535, 16-bit colour images are decoded by Pillow, and 32-bit images are rejected.
    """
    kind = name.partition(".")[0]
    if kind in ("truncated", "html", "drawing", "document"):
        return REJECTED
    if kind in ("int32", "float") and not value_range:
        return REJECTED
    if kind in ("grey16", "int32", "float") or (kind == "rgb16" and value_range):
        values = COLOUR if kind == "rgb16" else np.stack([RAMP] * 3, 2)
        low, high = value_range or (0, 65535)
        found = np.rint(((values - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)
        image, orientation = Image.fromarray(found), name.split(".")[1]
        if orientation.isdigit():
            image.getexif()[ExifTags.Base.Orientation] = int(orientation)
    else:
        image = Image.open(io.BytesIO(files()[name]))
    turns = upright and kind != "damaged_exif"
    return np.asarray((ImageOps.exif_transpose(image) if turns else image).convert("RGB"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all image files of :func:`files`, and with shards made from them."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("c", "d"):
        (folder / "images" / name).mkdir(parents=True)
    for name, data in files().items():
        (folder / "images" / "c" / name).write_bytes(data)
    (folder / "images" / "d" / "whole.jpg").write_bytes(files()["rgb.jpg"])
    convert(
        open_folder(folder / "images"), folder / "shards", split="x", skip_broken=99, quiet=True
    )
    return folder


@pytest.mark.parametrize(
    ("value_range", "exif"), [((), "auto"), ((1000, 50000), "apply"), ((), "ignore")]
)
def test_every_entry_reads_the_same_pixels_or_rejects_the_file(folder, value_range, exif):
    different = []
    for entry, read in by_entry(folder, value_range, exif).items():
        upright = exif == "apply" or (exif == "auto" and "detector" in entry)
        for name in files():
            wanted = expected(name, value_range, upright)
            try:
                found = np.asarray(read(name)).astype(np.float64)
            except (UserError, BrokenImageError, SystemExit, OSError, SyntaxError, ValueError):
                found = REJECTED
            if entry == "onnx" and name.startswith("rgb16.") and value_range:
                same = found is REJECTED  # Pillow can't read 16-bit colour images
            elif isinstance(found, str) or isinstance(wanted, str):
                same = found is wanted
            else:
                # The report stores its images as JPEG, which is lossy.
                error = np.abs(found - wanted)
                same = error.mean() < 12 if entry == "report" else error.max() == 0
            if not same:
                different.append((entry, name, found if found is REJECTED else "pixels"))
    assert different == []


def test_no_entry_runs_external_programs():
    # Pillow would run Ghostscript, if installed, to open an EPS file.
    shared = runpy.run_path(str(TOOLS / "onnx_images.py"))
    assert shared["formats"]() == allowed_formats()
    assert "EPS" in Image.OPEN
    assert "EPS" not in allowed_formats()


def test_truncated_images_are_rejected_even_if_a_script_makes_pillow_accept_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "truncated.jpg"
    path.write_bytes(encoded(RGB.resize((300, 300)), "JPEG")[:-500])
    Image.open(path).load()  # Pillow fills in the missing rows
    with pytest.raises(BrokenImageError):
        decode_exact(path.read_bytes())
    with pytest.raises(OSError, match="truncated"):
        read_image(str(path), "RGB")
    assert ImageFile.LOAD_TRUNCATED_IMAGES
