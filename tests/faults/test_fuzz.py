"""Tests with random input files from hypothesis, which must be read or raise a UserError."""

import contextlib
import io
import json
import math
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from senet_transfer import UserError
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.config import config_items, get_senet_config
from senet_transfer.config.load import load_config
from senet_transfer.data.base import RawSample
from senet_transfer.data.cifar.in_memory import load_images, split_file
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.formats.prepare import import_dataset, write_dataset
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.images.decode import BrokenImageError, decode_exact, decode_fast
from senet_transfer.data.images.places365 import read_categories, read_list
from senet_transfer.data.shards.tar import ShardWriter, read_shard
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.checkpoints.checkpointer import _training_state
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from tests.comparing import assert_same
from tests.data.detection.formats.test_readers import FIXTURES, make_images

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Return a folder for all examples of a test, which share the test's fixtures."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(f"{__name__}.SCRATCH", tmp_path / "scratch")


SCRATCH = Path()


def fuzz(examples: int) -> settings:
    """Return hypothesis settings that generate the same examples in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# --------------------------------------------------------------------------------- configs

KEYS = sorted(key for key, _ in config_items(get_senet_config()))
# Random values of these keys could cause downloads or write files.
BUILT = [key for key in KEYS if key not in ("MODEL.WEIGHTS", "OUTPUT_DIR", "DATALOADER.CACHE_DIR")]
NUMBERS = st.integers(-3, 70) | st.floats(-2, 70) | st.sampled_from([math.inf, -math.inf, math.nan])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = (
    SCALARS | st.lists(SCALARS, max_size=3) | st.lists(st.lists(NUMBERS, max_size=2), max_size=2)
)


@fuzz(300)
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
@example(b"MODEL: &a [*a]")
@example(b"MODEL: !!python/name:os.system")
@example(b"? [1]\n: 2")
@example(b"1: 2")
@example(b"_BASE_: [1]")
@example(b"_BASE_: /dev/null")
@example(b"VERSION: 1\nMODEL: {WEIGHTS: x}")
def test_any_config_file_is_read_or_refused(content):
    path = SCRATCH / "c.yaml"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        load_config(str(path))


@fuzz(300)
@given(st.lists(st.sampled_from(KEYS) | st.text(max_size=12) | VALUES.map(repr), max_size=4))
def test_any_options_are_taken_or_refused(options):
    with contextlib.suppress(UserError):
        load_config("", options)


@fuzz(80)
@given(kind=st.sampled_from(["folder", "detection"]), key=st.sampled_from(BUILT), value=VALUES)
@example("detection", "MODEL.ANCHOR_GENERATOR.SIZES", [[]])
@example("detection", "SOLVER.CHECKPOINT_PERIOD", 0)
@example("detection", "DATALOADER.SAMPLER_TRAIN", "x")
@example("folder", "SOLVER.LR_SCHEDULER_NAME", "x")
@example("folder", "INPUT.CLASSIFICATION.SCALE", [2, 1])
@example("folder", "MODEL.SE.RATIO", 0)
def test_a_key_of_any_value_is_trained_with_or_refused(words, kind, key, value):
    options = [*words[kind], "OUTPUT_DIR", str(SCRATCH / "run"), key, repr(value)]
    try:
        Trainer(setup(run_options(argument_parser().parse_args(options))))
    except UserError:
        pass
    except Exception as error:  # hypothesis would print the whole command
        pytest.fail(f"{kind} {key} {value!r}: {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------ COCO's JSON

BOXES = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 12, "height": 9},
        {"id": 2, "file_name": "b.png", "width": 12, "height": 9},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [
        {
            "id": number,
            "image_id": 1 + number % 2,
            "category_id": 3 + 2 * (number % 2),
            "bbox": [1, 2, 5, 4.5],
            "area": 22.5,
            "iscrowd": 0,
            "segmentation": [[1, 2, 6, 2, 6, 6]],
        }
        for number in (1, 2, 3)
    ],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Return the path of keys and indices to every nested value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


PLACES = list(places(BOXES))


def read_boxes(text: bytes) -> None:
    path = SCRATCH / "boxes.json"
    path.write_bytes(text)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (12, 9)).save(SCRATCH / name)
    with contextlib.suppress(UserError):
        register_coco_dataset("fuzzed", str(path), str(SCRATCH))
        DatasetCatalog.get("fuzzed")
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "fuzzed" in catalog:
            catalog.pop("fuzzed")


FORMAT_FILES = {
    "voc": "<annotation><filename>a.png</filename><object><name>a</name><bndbox><xmin>1</xmin>"
    "<ymin>2</ymin><xmax>8</xmax><ymax>7</ymax></bndbox></object></annotation>",
    "yolo": "train: [images]\nnames: {0: a, 1: b}\nnc: 2\nkpt_shape: [1, 2]\n",
    "labelme": (FIXTURES / "labelme.json").read_text().replace("..\\\\images\\\\", ""),
    "cvat": (FIXTURES / "cvat_images.xml").read_text(),
    "labelstudio": (FIXTURES / "labelstudio.json").read_text(),
    "via": (FIXTURES / "via.json").read_text(),
}
FRAGMENTS = ["", "null", "true", "-1", "0", "1e999", "NaN", "[]", "{}", "[[1]]", '"x"', "..", "<a>"]


@pytest.mark.parametrize("name", FORMAT_FILES)
@fuzz(80)
@given(st.data())
def test_other_formats_with_any_change_are_read_or_refused(name, data):
    text, suffix = FORMAT_FILES[name], {"voc": "xml", "yolo": "yaml", "cvat": "xml"}
    if not (SCRATCH / "a.png").exists():
        make_images(
            SCRATCH, a=(100, 80), images__a=(100, 80), c=(64, 48), sub__b=(64, 48), b=(9, 9)
        )
    for _ in range(data.draw(st.integers(0, 3))):
        # Replace a word or number, which keeps most files well-formed.
        tokens = list(re.finditer(r"[\w.+-]+|.", text))
        token = data.draw(st.sampled_from(tokens))
        text = text[: token.start()] + data.draw(st.sampled_from(FRAGMENTS)) + text[token.end() :]
    path = SCRATCH / f"a.{suffix.get(name, 'json')}"
    path.write_text(text)
    with contextlib.suppress(UserError):
        datasets, images = import_dataset(name, SCRATCH if name == "voc" else path, SCRATCH)
        write_dataset(datasets, SCRATCH / "out", images, source=str(path), replace=True)


@fuzz(400)
@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3))
def test_annotations_with_any_values_are_read_or_refused(changes):
    data = json.loads(json.dumps(BOXES))
    for path, value in changes:
        holder = {"": data}
        for key in ("", *path)[:-1]:
            with contextlib.suppress(LookupError, TypeError):
                holder = holder[key]
        with contextlib.suppress(LookupError, TypeError):
            holder[("", *path)[-1]] = value
        data = data if path else value
    read_boxes(json.dumps(data).encode())


@fuzz(200)
@given(st.data())
def test_damaged_annotation_files_are_read_or_refused(data):
    read_boxes(damaged(data, json.dumps(BOXES).encode()))


# ---------------------------------------------------------------------------- images, shards


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.RandomState(0).randint(0, 255, (24, 32, 4), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    else:
        image = Image.fromarray(pixels[..., :3]).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[274] = number
    return encoded("JPEG", exif=exif)


IMAGES = [
    encoded("JPEG"),
    encoded("JPEG", progressive=True),
    encoded("JPEG", "CMYK"),
    encoded("JPEG", "L"),
    *(with_orientation(number) for number in (3, 6, 9)),
    encoded("PNG"),
    encoded("PNG", "I;16"),
    encoded("PNG", "P"),
    encoded("PNG", "RGBA"),
    encoded("GIF", save_all=True, append_images=[Image.new("RGB", (32, 24), "red")]),
    encoded("WEBP"),
    encoded("BMP"),
    encoded("TIFF"),
    encoded("PPM"),
    b"",
]


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Return the content with bytes changed, removed, inserted or truncated."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        how = data.draw(st.sampled_from(["set", "cut", "remove", "insert"]))
        if how == "cut":
            del content[place:]
        elif how == "remove":
            del content[place : place + data.draw(st.integers(1, 40))]
        elif how == "insert":
            content[place:place] = data.draw(st.binary(max_size=12))
        elif content:
            content[place] = data.draw(st.integers(0, 255))
    return bytes(content)


@fuzz(600)
@given(st.data())
def test_damaged_images_are_read_or_refused(data):
    content = damaged(data, data.draw(st.sampled_from(IMAGES)))
    for decode in (decode_exact, decode_fast):
        with contextlib.suppress(BrokenImageError):
            assert np.asarray(decode(content)).shape[2] == 3
    path = SCRATCH / "image"
    path.write_bytes(content)
    mapper = CheckedDatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    with contextlib.suppress(UserError):
        mapper({"file_name": str(path), "image_id": 1, "width": 32, "height": 24})


def test_an_image_that_asks_for_gigabytes_is_refused_before_it_gets_them(tmp_path):
    bomb = bytearray(encoded("PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    for decode in (decode_exact, decode_fast):
        with pytest.raises(BrokenImageError):
            decode(bytes(bomb))
    mapper = CheckedDatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    with pytest.raises(UserError, match="bomb.png.*cannot be read"):
        mapper({"file_name": str(path), "image_id": 1, "width": 60_000, "height": 60_000})


def shard() -> bytes:
    stream = io.BytesIO()
    writer = ShardWriter(stream)
    for index in range(3):
        writer.write(RawSample(f"key{index}", index, IMAGES[index], ""))
    writer.close()
    return stream.getvalue()


def read(content: bytes) -> None:
    with contextlib.suppress(UserError):
        for sample in read_shard(io.BytesIO(content), "x.tar", samples=3, num_classes=3):
            with contextlib.suppress(BrokenImageError):
                decode_exact(sample.data)


@fuzz(400)
@given(st.data())
def test_damaged_shards_are_read_or_refused(data):
    read(damaged(data, shard()))


NAMES = st.text(max_size=10) | st.sampled_from(
    [
        "../a.jpg",
        "/a.jpg",
        "a.pkl",
        "a.b.jpg",
        "a.jpg",
        "a.cls",
        "a.json",
        "x/../a.cls",
        ".jpg",
        "a",
    ]
)
TYPES = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])


@fuzz(300)
@given(st.lists(st.tuples(NAMES, TYPES, st.binary(max_size=20)), max_size=6))
def test_shards_with_any_members_are_read_or_refused(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            with contextlib.suppress(UnicodeEncodeError):
                tar.addfile(member, io.BytesIO(content))
    before = sorted(SCRATCH.parent.rglob("*"))
    read(stream.getvalue())
    assert sorted(SCRATCH.parent.rglob("*")) == before


# ------------------------------------------------------- lists, manifests, arrays, checkpoints

LIST = b"a/b/one.jpg 0\na/b/two.jpg 1\n/c/three.jpg 2\n"


@fuzz(300)
@given(st.data())
def test_damaged_lists_are_read_or_refused(data):
    text = damaged(data, LIST).decode(errors="replace")
    with contextlib.suppress(UserError):
        names, labels = read_list(text, "list.txt", data.draw(st.none() | st.just(3)))
        assert len(names) == len(labels)
    with contextlib.suppress(UserError):
        assert all(read_categories(text, "categories.txt"))


@fuzz(150)
@given(data=st.data())
def test_a_damaged_file_beside_the_shards_is_read_or_refused(words, data):
    whole = Path(words["shards"][-1].strip("(',)"))
    folder = SCRATCH / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    name = data.draw(st.sampled_from(sorted(p.name for p in whole.iterdir() if p.is_file())))
    (folder / name).write_bytes(damaged(data, (whole / name).read_bytes()))
    with contextlib.suppress(UserError):
        dataset = open_dataset(folder)
        dataset.labels()
        for unit in range(len(dataset.unit_sizes)):
            for sample in dataset.read_unit(unit):
                assert 0 <= sample.label < 3


@fuzz(150)
@given(data=st.data())
def test_damaged_arrays_of_small_images_are_what_they_were_or_refused(words, data):
    whole = split_file(Path(words["memory"][-1].strip("(',)")), "train")
    path = split_file(SCRATCH, "train")
    path.write_bytes(damaged(data, whole.read_bytes()))
    with contextlib.suppress(UserError):
        assert torch.equal(load_images(path).images, load_images(whole).images)


@fuzz(150)
@given(data=st.data(), with_sum=st.booleans())
def test_a_damaged_checkpoint_is_what_it_was_or_refused(straight, data, with_sum):
    whole = straight("memory")[0].folder / "model_0000002.pth"
    path = SCRATCH / whole.name
    content = damaged(data, whole.read_bytes())
    path.write_bytes(content)
    if with_sum:
        shutil.copy(history.sum_file(whole), SCRATCH)
    problem = history.verify_checkpoint(path)
    history.sum_file(path).unlink(missing_ok=True)
    if with_sum:
        assert bool(problem) == (content != whole.read_bytes())
    if not problem:
        with contextlib.suppress(UserError):
            state = _training_state(str(path), ["trainer"])
            assert_same(state["trainer"], torch.load(whole, weights_only=True)["trainer"])
