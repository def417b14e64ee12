import os
import subprocess
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest
import torch

from senet_transfer.data.classification.loader import build_classification_train_loader
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import TrainTransform
from senet_transfer.errors import UserError
from tests.data.drawn_places import jpeg, keys_of_tar, shard_bytes, write_val

SMALL = TrainTransform(size=16)


def loader(dataset, **options):
    defaults = {"batch_size": 4, "transform": SMALL, "seed": 0}
    return build_classification_train_loader(dataset, **defaults | options)


def take(batches, count):
    return list(islice(batches, count))


def worker_streams(dataset, ranks, workers, batches):
    """Return the sample keys in training batches, separately for each worker of each rank."""
    each = max(workers, 1)
    streams = defaultdict(list)
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks, "num_workers": workers}
        for number, batch in enumerate(take(loader(dataset, **options), batches * each)):
            streams[rank * each + number % each] += batch["key"]
    return streams


@pytest.mark.parametrize("shards", [2, 13])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.long
def test_all_workers_together_yield_each_sample_once_per_epoch(make_shards, ranks, workers, shards):
    folder = make_shards(26, shards)
    shard_of = {key: tar.name for tar in folder.glob("*.tar") for key in keys_of_tar(tar)}
    sizes = {tar.name: len(keys_of_tar(tar)) for tar in folder.glob("*.tar")}
    num_workers = ranks * max(workers, 1)
    streams = worker_streams(open_dataset(folder), ranks, workers, batches=20)

    at_position = {}
    for worker, keys in streams.items():
        turn = 0
        while keys:
            size = sizes[shard_of[keys[0]]]
            visit, keys = keys[:size], keys[size:]
            if len(visit) == size:  # each worker's last shard may be incomplete
                at_position[worker + turn * num_workers] = visit
            turn += 1
    complete = next(position for position in range(10**6) if position not in at_position)
    epochs = complete // shards
    assert epochs >= 2
    for epoch in range(epochs):
        positions = range(epoch * shards, (epoch + 1) * shards)
        delivered = [key for position in positions for key in at_position[position]]
        assert sorted(delivered) == sorted(shard_of)


@pytest.mark.parametrize("class_aware", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", ["shards", "folder"])
@pytest.mark.long
def test_resuming_continues_with_the_batches_of_the_uninterrupted_run(
    make_shards, val, kind, workers, class_aware
):
    dataset = open_dataset(make_shards(24, 4) if kind == "shards" else val)
    options = {"num_workers": workers, "class_aware": class_aware, "shuffle_block": 4}
    options |= {"rank": 1, "world_size": 2}
    whole = take(loader(dataset, **options), 16)
    for start in (1, 5, 9):
        resumed = take(loader(dataset, start_iter=start, **options), 16 - start)
        for expected, batch in zip(whole[start:], resumed, strict=True):
            assert batch["key"] == expected["key"]
            assert torch.equal(batch["image"], expected["image"])
            assert torch.equal(batch["label"], expected["label"])


@pytest.mark.long
def test_class_aware_batches_are_balanced_for_any_ranks_and_workers(val):
    dataset = open_dataset(val)  # six images of each of four classes

    def steps(ranks, workers):
        options = {"batch_size": 12 // ranks, "num_workers": workers, "class_aware": True}
        each = [
            take(loader(dataset, rank=rank, world_size=ranks, **options), 8)
            for rank in range(ranks)
        ]
        return list(zip(*each, strict=True))

    expected = [[key for batch in step for key in batch["key"]] for step in steps(1, 0)]
    for ranks, workers in [(1, 0), (1, 3), (2, 0), (3, 2)]:
        for step, keys in zip(steps(ranks, workers), expected, strict=True):
            labels = torch.cat([batch["label"] for batch in step])
            assert labels.bincount().tolist() == [3, 3, 3, 3]
            assert [key for batch in step for key in batch["key"]] == keys


def test_batches_are_full_uint8_and_labelled_by_the_list(val):
    dataset = open_dataset(val)
    lines = (val / "places365_val.txt").read_text().splitlines()
    label_of = {line.split()[0].removesuffix(".jpg"): int(line.split()[1]) for line in lines}
    for batch in take(loader(dataset, batch_size=5), 12):
        assert batch["image"].shape == (5, 3, 16, 16)
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].is_contiguous()
        expected = [label_of[key.rpartition("_")[0]] for key in batch["key"]]
        assert batch["label"].tolist() == expected
        assert batch["label"].dtype == torch.int64


def test_each_image_has_its_own_crop_and_flip_in_each_epoch(tmp_path):
    root = write_val(tmp_path / "same", 8)
    for path in (root / "val_256").iterdir():
        path.write_bytes(jpeg(0))
    batches = take(loader(open_dataset(root), batch_size=8), 2)
    views = {image.numpy().tobytes() for batch in batches for image in batch["image"]}
    assert len(views) == 16


def test_augmentation_depends_only_on_seed_epoch_and_key(val):
    dataset = open_dataset(val)

    def images(**options):
        batches = take(loader(dataset, batch_size=24, **options), 1)
        pairs = zip(batches[0]["key"], batches[0]["image"], strict=True)
        return {key: image.numpy().tobytes() for key, image in pairs}

    assert images() == images(num_workers=1)
    other = images(seed=1)
    assert sum(other[key] == image for key, image in images().items()) < 3


def damage(folder, count):
    """Overwrite the ends of ``count`` images in shards with zeros, and keep the tar files valid."""
    done = []
    for tar in sorted(folder.glob("*.tar")):
        data = bytearray(tar.read_bytes())
        at = data.find(b"\xff\xd9\0")
        while at > 0 and len(done) < count:
            data[at - 60 : at + 2] = bytes(62)
            done.append(at)
            at = data.find(b"\xff\xd9\0", at + 1)
        tar.write_bytes(data)
    assert len(done) == count


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.long
def test_broken_images_are_skipped_and_logged_and_batches_stay_full(make_shards, workers, caplog):
    folder = make_shards(24, 3)
    whole = take(loader(open_dataset(folder), num_workers=workers), 6)
    damage(folder, 2)
    batches = loader(open_dataset(folder), num_workers=workers, max_skip_ratio=0.5)
    delivered = take(batches, 6)
    skipped = [
        key
        for expected, batch in zip(whole, delivered, strict=True)
        for key in set(expected["key"]).difference(batch["key"])
    ]
    assert [len(batch["key"]) for batch in delivered] == [4] * 6
    assert len(skipped) <= 2
    if workers == 0:
        assert len(skipped) == 2
        assert (batches.skips.skipped, batches.skips.seen) == (2, 24)
        assert all(key in caplog.text for key in skipped)
    else:
        assert batches.skips.skipped >= len(skipped)
    for batch in delivered:
        twice = [key for key in batch["key"] if batch["key"].count(key) > 1]
        places = [place for place, key in enumerate(batch["key"]) if key in twice]
        for place in places:
            assert torch.equal(batch["image"][place], batch["image"][places[0]]) or len(twice) > 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_are_fatal_and_named(make_shards, workers):
    folder = make_shards(24, 3)
    damage(folder, 6)
    batches = loader(open_dataset(folder), num_workers=workers, max_skip_ratio=0.002)
    with pytest.raises(UserError, match=r"\d+ of \d+ images cannot be decoded.*Places365_val_\d+"):
        take(batches, 30)


def test_a_message_from_a_worker_arrives_without_a_traceback(make_shards):
    folder = make_shards(24, 3)
    for tar in folder.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:2048])
    with pytest.raises(UserError) as caught:
        take(loader(open_dataset(folder), num_workers=1), 6)
    assert str(caught.value).startswith("Shard ")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"num_workers": -1},
        {"rank": 2, "world_size": 2},
        {"start_iter": -1},
        {"seed": -1},
        {"max_skip_ratio": 1.5},
        {"shuffle_block": 0},
    ],
)
def test_invalid_numbers_are_rejected(val, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        loader(open_dataset(val), **wrong)


SCRIPT = """
import subprocess, sys
from itertools import islice
from senet_transfer.data.images.transforms import TrainTransform
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.classification.loader import build_classification_train_loader

loader = build_classification_train_loader(
    open_dataset(sys.argv[1]), batch_size=2, transform=TrainTransform(size=16), seed=0,
    num_workers=2,
)
batches = iter(loader)
next(batches)
import multiprocessing
for worker in multiprocessing.active_children():
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
print(sum(len(batch["key"]) for batch in islice(batches, 40)))
"""


@pytest.mark.long
def test_workers_ignore_sigterm_and_exit_with_the_main_process(val):
    # The script exits while its workers are running, and must not wait for them forever.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(val)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "80"), done.stderr


def test_reading_does_not_change_the_data(make_shards):
    folder = make_shards(24, 3)
    before = shard_bytes(folder)
    take(loader(open_dataset(folder), class_aware=True), 8)
    assert shard_bytes(folder) == before
