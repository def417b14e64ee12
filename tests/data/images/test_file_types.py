"""Tests for reading image files of all types, and for ignoring files such as Thumbs.db."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from senet_transfer import UserError
from senet_transfer.config.load import load_config
from senet_transfer.data.build import find_dataset, use_classification_datasets
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.decode import decode_exact, decode_fast
from senet_transfer.data.images.file_types import FORMATS, IMAGE_SUFFIXES, is_image_name
from senet_transfer.data.own_data import find_parts
from senet_transfer.data.shards.verify import verify
from senet_transfer.engine.predictor.inputs import find_photos
from tests.data.drawn_places import command, jpeg

SUFFIXES = (".jpg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".TIF", ".ppm",
            ".jp2", ".avif", ".tga", ".qoi")  # fmt: skip
SYSTEM = ("._0.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", "@eaDir/0.jpg/SYNO_THUMB_M.jpg",
          "__MACOSX/0.jpg", ".ipynb_checkpoints/0.jpg")  # fmt: skip


def encoded(seed: int, suffix: str) -> bytes:
    """Return a 32x32 image, encoded by Pillow in the format of the given file extension."""
    Image.init()
    buffer = io.BytesIO()
    options = {"lossless": True} if suffix in (".webp", ".jp2") else {}
    pixels = np.random.RandomState(seed).randint(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, Image.EXTENSION[suffix.lower()], **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Write one image file of each type per class, with system files between them."""
    root = tmp_path_factory.mktemp("mixed")
    for split in ("train", "test"):
        for seed, name in enumerate(("cat", "dog")):
            for number, suffix in enumerate(SUFFIXES):
                path = root / split / name / f"{number}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(100 * seed + number, suffix))
            for system in SYSTEM:
                path = root / split / name / system
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"no image")
        (root / split / "__MACOSX" / "cat").mkdir(parents=True)
        (root / split / "@eaDir").mkdir()
    return root


def by_pillow(root: Path) -> list[bytes]:
    """Decode all files whose extension Pillow supports; return their RGB bytes in sorted order."""
    Image.init()
    paths = [
        path
        for name in ("cat", "dog")
        for path in (root / name).iterdir()
        if path.suffix.lower() in Image.EXTENSION and not path.name.startswith(".")
    ]
    assert len(paths) == 2 * len(SUFFIXES)
    return sorted(Image.open(path).convert("RGB").tobytes() for path in paths)


def test_extensions_equal_pillows():
    Image.init()
    for suffix in IMAGE_SUFFIXES:
        assert Image.EXTENSION[suffix] in FORMATS
    # All file types of torchvision's ImageFolder are included.
    assert set(IMG_EXTENSIONS) <= set(IMAGE_SUFFIXES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_type_is_decoded_as_by_pillow(suffix):
    data = encoded(7, suffix)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert decode_exact(data).tobytes() == expected.tobytes()
    assert np.array_equal(decode_fast(data), np.asarray(expected))


@pytest.mark.parametrize(
    "entry", ["folder", "cifar folder", "cifar archive", "prepared", "predict", "pattern"]
)
def test_every_entry_finds_the_same_files(mixed, tmp_path, entry):
    expected = by_pillow(mixed / "train")
    if entry in ("predict", "pattern"):
        names = [str(mixed / "train" / name) for name in ("cat", "dog")]
        if entry == "pattern":
            names = [str(mixed / "train" / "**" / f"*{suffix}") for suffix in SUFFIXES]
        found = [photo.pillow().tobytes() for photo in find_photos(names)]
    elif entry.startswith("cifar"):
        if entry == "cifar archive":
            for split in ("train", "test"):
                with tarfile.open(tmp_path / f"{split}.tar.gz", "w:gz") as tar:
                    tar.add(mixed / split, split)
        data = open_cifar(mixed if entry == "cifar folder" else tmp_path, split="train")
        assert list(data.classes) == ["cat", "dog"]
        found = [image.permute(1, 2, 0).numpy().tobytes() for image in data.images]
    else:
        root = mixed / "train"
        if entry == "prepared":
            words = ["--source", root, "--output", tmp_path / "shards", "--quiet", "--workers", 1]
            assert command("prepare_folder")(words) == 0
            root = tmp_path / "shards"
            assert verify(root, quiet=True) == 2 * len(SUFFIXES)
        data = open_dataset(root)
        assert data.classes == ["cat", "dog"]
        found = [decode_exact(data.read_sample(i).data).tobytes() for i in range(len(data))]
        units = [s for unit in range(len(data.unit_sizes)) for s in data.read_unit(unit)]
        assert len(units) == len(found)
    assert sorted(found) == expected


@pytest.mark.parametrize("case", ["macos/train", "folders/eadir", "folders/macosx", "webp"])
def test_real_cases_have_the_images_that_pillow_reads(shared_data, case):
    root = shared_data.parent / "cases" / "classification" / case
    roots = [root] if case != "webp" else [p for p in root.iterdir() if p.is_dir()]
    for root in roots:
        readable = 0
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            if path.is_file() and not any(part[:1] in "._@" for part in parts):
                try:
                    Image.open(path).load()
                    readable += 1
                except OSError:
                    assert path.name == "Thumbs.db"
        assert readable
        train = root / "train" if (root / "train").is_dir() else root
        if train != root:
            readable = sum(is_image_name(path.name) for path in train.rglob("*"))
        assert len(open_dataset(train)) == readable


def write_webdataset(root: Path, *, label: str = "cls") -> list[tuple[bytes, int]]:
    """Write shards with webdataset's writer, and return the images and labels in order."""
    import webdataset

    root.mkdir()
    written = []
    with webdataset.ShardWriter(f"{root}/own-%06d.tar", maxcount=3, verbose=False) as sink:
        for index in range(8):
            data, number = jpeg(index), index * 5 % 4
            sample = {"__key__": f"s{index:04d}", "jpg": data, "txt": f"caption {index}"}
            sample[label] = number if label == "cls" else {"label": number, "width": 40}
            sink.write(sample)
            written.append((data, number))
    return written


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("form", ["folder", "pattern", "file", "manifest"])
def test_webdatasets_own_shards_are_read_without_a_manifest(tmp_path, label, form):
    root = tmp_path / "shards"
    written = write_webdataset(root, label=label)
    classes = [str(number) for number in range(4)]
    path: Path = root
    if form == "pattern":
        path = root / "own-*.tar"
    elif form == "file":
        path, written = root / "own-000001.tar", written[3:6]
        classes = [str(n) for n in range(1 + max(number for _, number in written))]
    elif form == "manifest":
        classes = ["a", "b", "c", "d"]
        (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
        assert command("manifest")([root, "--classes", tmp_path / "classes.txt"]) == 0
        assert json.loads((root / "manifest.json").read_text())["samples"] == 8
        assert command("manifest")([root]) == 2
    data = open_dataset(path)
    assert data.classes == classes
    found = [s for unit in range(len(data.unit_sizes)) for s in data.read_unit(unit)]
    assert [(sample.data, sample.label) for sample in found] == written
    assert data.labels().tolist() == [number for _, number in written]
    assert [data.read_sample(i).data for i in range(len(data))] == [d for d, _ in written]
    assert len({sample.key for sample in found}) == len(written)
    assert [s.data for s in data.read_unit(0, 2)] == [written[2][0]]
    names = list("wxyz")
    if form != "manifest":
        assert open_dataset(path, classes=names).classes == names
        with pytest.raises(UserError, match="labels up to .* 1 classes"):
            open_dataset(path, classes=["only"])


@pytest.mark.parametrize("counted", [False, True])
def test_braces_expand_to_shards_as_in_webdataset(tmp_path, counted):
    root = tmp_path / "shards"
    written = write_webdataset(root)
    if counted:
        assert command("manifest")([root]) == 0
    data = open_dataset(f"{root}/own-{{000000..000001}}.tar")
    found = [s for unit in range(len(data.unit_sizes)) for s in data.read_unit(unit)]
    assert [(sample.data, sample.label) for sample in found] == written[:6]
    assert len(open_dataset(f"{root}/own-00000{{2,0}}.tar")) == 5
    with pytest.raises(UserError, match=r"4 shards, of which 1 are missing: .*own-000003\.tar"):
        open_dataset(f"{root}/own-{{000000..000003}}.tar")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "own-000000.tar").write_bytes((root / "own-000000.tar").read_bytes())
    with pytest.raises(UserError, match="in 2 folders"):
        open_dataset(f"{tmp_path}/{{shards,copy}}/own-000000.tar")


def test_commands_accept_patterns_of_shards(tmp_path, monkeypatch):
    write_webdataset(tmp_path / "shards")
    (tmp_path / "datasets" / "own [2]" / "a").mkdir(parents=True)
    (tmp_path / "datasets" / "own {2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    for pattern, count in {"*": 8, "00000?": 8, "00000[02]": 5, "{000000..000001}": 6}.items():
        train, val = find_parts(f"shards/own-{pattern}.tar")
        assert (train.path, val) == (f"{tmp_path}/shards/own-{pattern}.tar", None)
        assert len(open_dataset(train.path)) == count
    for name in ("own [2]", "own {2"):
        assert find_dataset(name) == f"{tmp_path}/datasets/{name}"
    with pytest.raises(UserError, match="not found; tried"):
        find_dataset("shards/own-?.tar")
    with pytest.raises(UserError, match="nor a valid pattern for shards: Unbalanced braces"):
        find_dataset("shards/own-{0.tar")


def test_shards_with_unreadable_names_are_rejected(tmp_path, capsys):
    write_webdataset(tmp_path / "shards")
    (tmp_path / "shards" / "own-000001.tar").rename(tmp_path / "shards" / "own+new-000001.tar")
    with pytest.raises(UserError, match=r"the shards own\+new-000001\.tar in .* Rename"):
        open_dataset(tmp_path / "shards")
    assert command("manifest")([tmp_path / "shards"]) == 2
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize("cut", [700, 5000])
def test_a_truncated_shard_without_a_manifest_is_rejected(tmp_path, cut):
    write_webdataset(tmp_path / "shards")
    path = tmp_path / "shards" / "own-000002.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="own-000002"):
        open_dataset(tmp_path / "shards")


def test_a_parent_of_splits_and_a_single_class_are_detected(shared_data, tmp_path):
    folders = shared_data.parent / "cases" / "classification" / "folders"
    with pytest.raises(UserError, match=r"train, val, which are splits.*Pass one.*splits_parent/"):
        open_dataset(folders / "splits_parent")
    classes = [f"{split}/{name}" for split in ("train", "val") for name in "ab"]
    assert open_dataset(folders / "splits_parent", classes=classes).classes == classes
    cfg = load_config("configs/base/classification.yaml")
    cfg.DATASETS.TRAIN = (str(folders / "single"),)
    with pytest.raises(UserError, match="a single class, only; expected at least two"):
        use_classification_datasets(cfg)
    # "train" may also be a class, such as in a dataset of vehicles.
    for name in ("train", "bus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(0))
    assert open_dataset(tmp_path).classes == ["bus", "train"]
