from itertools import islice

import numpy as np
import pytest

from senet_transfer.data.classification.open import ImageDataset, open_dataset
from senet_transfer.data.classification.sampling import (
    class_aware_stream,
    share,
    train_stream,
    unit_positions,
)


def row(sizes, num_workers, epochs, seed=3):
    """Return the (epoch, unit) pairs of all workers, with one pair of each worker in turn.

    A unit is a shard or a single image.
    """
    merged = {}
    for worker in range(num_workers):
        positions = unit_positions(
            np.array(sizes), seed=seed, worker=worker, num_workers=num_workers
        )
        for turn, (epoch, unit, skip) in zip(range(epochs * len(sizes)), positions, strict=False):
            merged[worker + turn * num_workers] = (epoch, unit)
            assert skip == 0
    return [merged[position] for position in range(epochs * len(sizes))]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 6, 16])
@pytest.mark.parametrize("sizes", [[5], [4, 4, 4], [3, 9, 1, 7, 7, 2, 5]])
def test_every_epoch_has_each_unit_once_for_any_number_of_workers(sizes, num_workers):
    positions = row(sizes, num_workers, epochs=4)
    for epoch in range(4):
        part = positions[epoch * len(sizes) : (epoch + 1) * len(sizes)]
        assert sorted(unit for _, unit in part) == list(range(len(sizes)))
        assert {number for number, _ in part} == {epoch}


def test_epochs_and_seeds_have_different_orders():
    sizes = [1] * 50
    positions = row(sizes, 1, epochs=2)
    assert positions[:50] != [(0, unit) for _, unit in positions[50:]]
    assert [unit for _, unit in row(sizes, 1, 1)] != [unit for _, unit in row(sizes, 1, 1, seed=4)]


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 9, 1, 7, 7, 2, 5], [1] * 11])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_starting_later_continues_the_same_sequence(sizes, num_workers):
    sizes = np.array(sizes)

    def samples(start):
        positions = unit_positions(
            sizes, seed=0, worker=num_workers - 1, num_workers=num_workers, start=start
        )
        for epoch, unit, skip in positions:
            yield from ((epoch, unit, place) for place in range(skip, sizes[unit]))

    whole = list(islice(samples(0), 200))
    for start in range(0, 150):
        assert list(islice(samples(start), 50)) == whole[start : start + 50]


@pytest.mark.parametrize("block", [1, 4, 100])
def test_samples_of_a_shard_are_each_yielded_once_for_any_block_size(make_shards, block):
    dataset = open_dataset(make_shards(30, 10))
    stream = train_stream(dataset, seed=0, worker=0, num_workers=1, block=block)
    first, second = list(islice(stream, 30)), list(islice(stream, 30))
    assert len({sample.key for _, sample in first}) == 30
    assert {sample.key for _, sample in first} == {sample.key for _, sample in second}
    assert [sample.key for _, sample in first] != [sample.key for _, sample in second]


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_class_aware_sampling_is_balanced_and_without_replacement(make_shards, val, kind):
    dataset = open_dataset(make_shards(24, 3) if kind == "shards" else val)
    draws = list(class_aware_stream(dataset, seed=0, draws=range(4 * 12)))
    for turn in range(12):
        assert {sample.label for _, sample in draws[4 * turn : 4 * turn + 4]} == {0, 1, 2, 3}
    # There are 6 images of each of the 4 classes.
    for label in range(4):
        keys = [sample.key for _, sample in draws if sample.label == label]
        assert len(set(keys[:6])) == len(set(keys[6:])) == 6
        assert [epoch for epoch, sample in draws if sample.label == label] == [0] * 6 + [1] * 6


def test_class_aware_sampling_is_unbiased_for_classes_of_any_size(val):
    dataset = open_dataset(val)
    images = dataset.images
    keep = np.flatnonzero((images.labels != 2) | (np.arange(24) == 2))  # keep one image of class 2
    labels = images.labels[keep]
    names = [images.names[index] for index in keep]
    few = ImageDataset(type(images)(images.root, names, labels, images.classes, images.sizes[keep]))
    stream = class_aware_stream(few, seed=0, draws=range(400))
    counts = np.bincount([sample.label for _, sample in stream])
    assert counts.tolist() == [100, 100, 100, 100]


@pytest.mark.parametrize("total", [0, 1, 7, 100])
@pytest.mark.parametrize("num_workers", [1, 3, 8])
def test_evaluation_shares_differ_by_one_sample_at_most_and_are_complete(total, num_workers):
    shares = [share(total, worker, num_workers) for worker in range(num_workers)]
    assert [sample for first, end in shares for sample in range(first, end)] == list(range(total))
    sizes = [end - first for first, end in shares]
    assert max(sizes) - min(sizes) <= 1
