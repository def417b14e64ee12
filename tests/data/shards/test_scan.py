"""Tests that shards without a manifest are either read as webdataset reads them, or rejected."""

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
import webdataset

from senet_transfer import UserError
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.own_data import divide, find_parts
from tests.data.drawn_places import command, jpeg


def write_tar(path: Path, *names: str) -> Path:
    """Write a tar file with the given files. Files other than images contain the label 1."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            data = jpeg(number) if name.endswith(".jpg") else b"1"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def by_webdataset(path: Path) -> list[bytes]:
    samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [sample["jpg"] for sample in samples]


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["x-train-000.tar", "x-train-001.tar", "x-val-000.tar"], r"x-train-\*.tar, x-val-\*.tar"),
        (["train-0.tar", "val-0.tar"], r"train-\*.tar, val-\*.tar"),
        (["x-0.tar", "x-test-0.tar"], r"x-\*.tar, x-test-\*.tar"),
    ],
)
def test_shards_of_several_splits_in_a_folder_are_rejected(tmp_path, names, patterns):
    for name in names:
        write_tar(tmp_path / name, f"{name[:-4]}.jpg", f"{name[:-4]}.cls")
    with pytest.raises(UserError, match=f"several splits: {patterns}. .*Pass the pattern") as error:
        open_dataset(tmp_path)
    pattern = str(error.value).split("'")[1]
    word = Path(pattern).name.removesuffix("-*.tar")
    assert len(open_dataset(pattern)) == sum(name.startswith(word) for name in names)
    assert command("manifest")([tmp_path]) == 2


@pytest.mark.parametrize(
    "names",
    [
        ["a-train-0.tar", "b-train-0.tar"],
        ["a-0.tar", "b-0.tar"],
        ["train-0.tar", "extra-0.tar"],
    ],
)
def test_shards_of_one_split_are_read_together(tmp_path, names):
    for name in names:
        write_tar(tmp_path / name, "0.jpg", "0.cls")
    assert len(open_dataset(tmp_path)) == 2


@pytest.mark.parametrize("name", ["annotations.tar.gz", "val-0.tgz", "d.tar.bz2"])
def test_a_compressed_file_with_another_name_than_the_shards_is_ignored(tmp_path, name, caplog):
    for shard in ("d-0.tar", "d-1.tar"):
        data = write_tar(tmp_path / shard, "0.jpg", "0.cls").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data))
    assert len(open_dataset(tmp_path)) == 2
    assert f"Ignoring 1 compressed files in {tmp_path}, because" in caplog.text
    assert f"uncompressed shards. Ignored files: {name}" in caplog.text
    for shard in ("d-0.tar", "d-1.tar"):
        (tmp_path / shard).unlink()
    with pytest.raises(UserError, match=f"are compressed: {name}"):
        open_dataset(tmp_path)


def test_a_file_that_a_sample_contains_twice_is_rejected(tmp_path):
    path = write_tar(tmp_path / "own.tar", "0.jpg", "0.cls", "0.JPG", "0.cls")
    with pytest.raises(ValueError, match="duplicate file name in tar file"):
        by_webdataset(path)
    with pytest.raises(UserError, match=r"own\.tar contains 0.JPG twice in a row"):
        open_dataset(path)


def test_members_without_an_extension_are_skipped(tmp_path):
    path = write_tar(
        tmp_path / "own.tar", "README", "0.jpg", "a.b/LICENSE", "0.cls", "1.jpg", "1.cls"
    )
    data = open_dataset(path)
    assert [data.read_sample(index).data for index in range(2)] == by_webdataset(path)
    assert len(data) == 2


@pytest.mark.parametrize("entry", ["folder", "file", "pattern", "manifest", "train"])
@pytest.mark.parametrize(
    ("name", "compress", "remedy"),
    [
        ("x-1.tar.gz", gzip.compress, "gunzip x-1.tar.gz"),
        ("x-1.tgz", gzip.compress, "gunzip x-1.tgz"),
        ("x-1.tar", gzip.compress, "mv x-1.tar x-1.tar.gz && gunzip x-1.tar.gz"),
        ("x-1.tar.xz", lzma.compress, "unxz x-1.tar.xz"),
        ("x-1.tar.bz2", bz2.compress, "bunzip2 x-1.tar.bz2"),
    ],
)
def test_compressed_shards_are_rejected_with_the_command_that_decompresses_them(
    tmp_path, name, compress, remedy, entry, capsys
):
    root = tmp_path / "shards"
    data = write_tar(root / "x-0.tar", "0.jpg", "0.cls").read_bytes()
    (root / name).write_bytes(compress(data))
    match = f"shards in {root} are compressed: {name}.*: {remedy}$"
    if entry == "manifest":
        assert command("manifest")([root]) == 2
    elif entry == "train":
        with pytest.raises(UserError, match="consists of shards"):
            divide(find_parts(str(root))[0], tmp_path / "split")
    else:
        path = {"folder": root, "file": root / name, "pattern": root / "x-*"}[entry]
        with pytest.raises(UserError, match=match):
            open_dataset(path)


def test_shards_that_would_have_to_be_split_are_rejected(tmp_path):
    write_tar(tmp_path / "shards" / "x-0.tar", "0.jpg", "0.cls")
    for path in ("shards", "shards/x-0.tar", "shards/x-*.tar"):
        train, val = find_parts(str(tmp_path / path))
        assert val is None
        with pytest.raises(UserError, match="Cannot split .* consists of shards. .*--val"):
            divide(train, tmp_path / "split")
