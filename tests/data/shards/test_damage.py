"""Tests that damaged and malicious shards are detected and named in the error."""

import hashlib
import io
import json
import os
import pickle
import tarfile

import pytest

from senet_transfer.data.classification.loader import (
    build_classification_eval_loader,
    build_classification_train_loader,
)
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform
from senet_transfer.data.shards.verify import verify
from senet_transfer.errors import UserError
from tests.data.drawn_places import jpeg


@pytest.fixture
def shards(make_shards):
    return make_shards(24, 2)


def evaluate(folder, workers=0):
    transform = EvalTransform(resize=24, crop=16)
    loader = build_classification_eval_loader(
        open_dataset(folder), batch_size=5, transform=transform, num_workers=workers
    )
    return sum(len(batch["key"]) for batch in loader)


def train(folder, workers=0):
    loader = build_classification_train_loader(
        open_dataset(folder), batch_size=6, transform=TrainTransform(size=16), seed=0
    )
    for _, _ in zip(range(8), loader, strict=False):
        pass


def members(path):
    """Return the header offset, data offset and size of each file in a tar archive."""
    with tarfile.open(path) as tar:
        return [(member.offset, member.offset_data, member.size) for member in tar]


def first_shard(folder):
    return folder / "val-000000.tar"


def agree(folder):
    """Update the manifest's sizes and hashes to match altered shards, as an attacker would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def insert(folder, member, data):
    """Insert a file at the start of the first shard, and update the manifest."""
    path = first_shard(folder)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    length = 512 + -(-len(data) // 512) * 512
    path.write_bytes(buffer.getvalue()[:length] + path.read_bytes())
    agree(folder)


@pytest.mark.parametrize("use", [evaluate, train])
def test_a_shard_truncated_between_members_is_detected_by_the_count(shards, use):
    path = first_shard(shards)
    cut = members(path)[10][0]  # before a label, after complete samples
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        UserError, match=r"val-000000\.tar is damaged: found 5 samples, .* lists 12"
    ):
        use(shards)


@pytest.mark.parametrize("use", [evaluate, train])
def test_a_shard_truncated_between_label_and_image_is_detected(shards, use):
    path = first_shard(shards)
    path.write_bytes(path.read_bytes()[: members(path)[11][0]])
    with pytest.raises(UserError, match=r"val-000000\.tar has 0 images"):
        use(shards)


@pytest.mark.parametrize("use", [evaluate, train])
def test_a_shard_truncated_inside_an_image_is_detected(shards, use):
    path = first_shard(shards)
    path.write_bytes(path.read_bytes()[: members(path)[11][1] + 100])
    with pytest.raises(UserError, match=r"val-000000\.tar is damaged"):
        use(shards)


@pytest.mark.parametrize("use", [evaluate, train])
@pytest.mark.parametrize("member", [0, 10, 11])
def test_a_flipped_header_byte_is_detected(shards, use, member):
    path = first_shard(shards)
    data = bytearray(path.read_bytes())
    data[members(path)[member][0] + 3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"val-000000\.tar"):
        use(shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_jpeg_is_skipped_in_training_but_fails_evaluation(shards, workers, caplog):
    path = first_shard(shards)
    _, offset, size = members(path)[11]
    data = bytearray(path.read_bytes())
    data[offset + size // 2 : offset + size] = bytes(size - size // 2)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"Cannot decode Places365_val_\d+_\d+ in .*000000\.tar"):
        evaluate(shards, workers)
    train(shards)
    assert "Skipping a broken image: Places365_val_" in caplog.text


@pytest.mark.parametrize("use", [evaluate, train])
@pytest.mark.parametrize("name", ["../../x", "../../x.jpg", "/etc/x.jpg", "a/../../x.jpg"])
def test_a_member_outside_the_folder_is_rejected_and_nothing_is_written(
    shards, use, name, tmp_path, monkeypatch
):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    insert(shards, tarfile.TarInfo(name), jpeg(0))
    with pytest.raises(UserError, match="contains a member named"):
        use(shards)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


class Bomb:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("use", [evaluate, train])
@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "npy", "jpg.pyd"])
def test_a_pickled_member_is_rejected_and_never_unpickled(shards, use, extension, tmp_path):
    insert(shards, tarfile.TarInfo(f"x.{extension}"), pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match="Pickles .* are rejected"):
        use(shards)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("use", [evaluate, train])
def test_a_symlink_in_place_of_an_image_is_detected(shards, use):
    member = tarfile.TarInfo("evil.jpg")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    insert(shards, member, b"")
    insert(shards, tarfile.TarInfo("evil.cls"), b"1")
    with pytest.raises(UserError, match=r"evil in shard .*val-000000\.tar has 0 images"):
        use(shards)


@pytest.mark.parametrize("use", [evaluate, train])
@pytest.mark.parametrize("label", [b"4", b"-1", b"x", b"", b"99999999999"])
def test_an_invalid_label_is_detected(shards, use, label):
    insert(shards, tarfile.TarInfo("extra.jpg"), jpeg(1))
    insert(shards, tarfile.TarInfo("extra.cls"), label)
    with pytest.raises(UserError, match="Sample extra in shard"):
        use(shards)


@pytest.mark.parametrize("use", [evaluate, train])
def test_more_samples_than_in_the_manifest_are_detected(shards, use):
    insert(shards, tarfile.TarInfo("extra.jpg"), jpeg(1))
    insert(shards, tarfile.TarInfo("extra.cls"), b"1")
    with pytest.raises(UserError, match="more than the 12 samples"):
        use(shards)


@pytest.mark.parametrize("use", [evaluate, train])
def test_a_missing_shard_is_named(shards, use):
    first_shard(shards).unlink()
    with pytest.raises(UserError, match=r"Cannot open .*val-000000\.tar"):
        use(shards)


@pytest.mark.parametrize("where", ["header", "image", "label"])
def test_verify_finds_a_single_flipped_bit_anywhere(shards, where):
    assert verify(shards) == 24
    path = first_shard(shards)
    header, offset, size = members(path)[11 if where != "label" else 10]
    data = bytearray(path.read_bytes())
    data[header + 3 if where == "header" else offset + size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"1 shards are damaged:\n.*val-000000\.tar has SHA-256"):
        verify(shards, workers=2)
    agree(shards)
    if where != "image":  # an image with a flipped bit may still be readable
        with pytest.raises(UserError, match=r"1 shards are damaged:\n.*val-000000"):
            verify(shards)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda content: content.pop("format"), "not a shard manifest"),
        (lambda content: content.update(version=99), "version 99"),
        (lambda content: content.pop("shards"), "damaged: KeyError"),
        (lambda content: content.update(samples=25), "specifies 25 samples"),
        (lambda content: content["shards"][0].update(samples=11), "is inconsistent"),
        (lambda content: content["shards"][0].update(name="../x.tar"), "plain name"),
        (lambda content: content["shards"][0].update(name="pipe:ls"), "plain name"),
        (lambda content: content.update(shards=[], samples=0), "0 shards"),
        (lambda content: content.update(classes=["one"]), "invalid labels"),
    ],
)
def test_an_inconsistent_manifest_is_rejected(shards, change, found):
    path = shards / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=found):
        open_dataset(shards)


def test_an_index_of_other_shards_is_rejected_in_class_aware_sampling(shards):
    a, b = (shards / f"val-00000{number}.index.npy" for number in range(2))
    b.write_bytes(a.read_bytes())
    dataset = open_dataset(shards)
    options = {"batch_size": 24, "transform": TrainTransform(size=16), "seed": 0}
    with pytest.raises(UserError, match="shard does not match its index"):
        next(iter(build_classification_train_loader(dataset, class_aware=True, **options)))


@pytest.mark.parametrize("url", ["pipe:touch x", "PIPE:touch x", "ftp://x/y", "hf://x", "gopen:x"])
def test_urls_that_run_commands_or_are_unknown_are_rejected(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Cannot read .* expected a local path or one of"):
        open_dataset(url)
    assert list(tmp_path.iterdir()) == []
