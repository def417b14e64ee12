"""Who reads which sample when: positions, as pure functions of seed, consumer and count.

Training knows C = ranks x workers consumers. The units (shards, or single images) of all epochs
form one endless row, epoch e taking the positions e*U to (e+1)*U-1 in an order drawn from seed and
e. Consumer c reads the positions g with g % C == c. So nobody starves with fewer shards than
consumers, each epoch of U positions is read exactly once by all consumers together, and where a
consumer stands follows from the number of samples it has delivered. Nothing has to be stored to
resume but that number.

Within a shard samples are permuted in blocks, which costs the memory of a block of undecoded
images and keeps every position computable.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from senet_transfer.data.base import ClassificationDataset, RawSample
from senet_transfer.errors import UserError

SHUFFLE_BLOCK = 1024


def unit_positions(
    sizes: np.ndarray, *, seed: int, consumer: int, consumers: int, start: int = 0
) -> Iterator[tuple[int, int, int]]:
    """Yields the units of a consumer without end.

    Args:
        sizes: `(U,)`, samples in each unit.
        seed: of the order.
        consumer: 0 to `consumers` - 1.
        consumers: how many share the row.
        start: samples of this consumer to leave out.

    Yields:
        Epoch, unit, and the samples to leave out at the unit's beginning.
    """
    units = len(sizes)
    uniform = int(sizes[0]) if (sizes == sizes[0]).all() else None
    epoch = 0
    while True:
        first = (consumer - epoch * units) % consumers
        if uniform is not None:
            # Skipping needs no order when all units are of a size: folders of millions of images.
            total = len(range(first, units, consumers)) * uniform
            if start >= total:
                start, epoch = start - total, epoch + 1
                continue
        order = np.random.default_rng([seed, epoch]).permutation(units)[first::consumers]
        ends = np.cumsum(sizes[order])
        begin = int(np.searchsorted(ends, start, side="right"))
        for unit in order[begin:]:
            skip = start - int(ends[begin - 1]) if begin else start
            yield epoch, int(unit), max(skip, 0)
            start = begin = 0
        if begin:
            start -= int(ends[-1])
        epoch += 1


def train_stream(
    dataset: ClassificationDataset,
    *,
    seed: int,
    consumer: int,
    consumers: int,
    start: int = 0,
    block: int = SHUFFLE_BLOCK,
) -> Iterator[tuple[int, RawSample]]:
    """Yields a consumer's samples without end, with the epoch of each.

    Args:
        dataset: what to read.
        seed: of all orders.
        consumer: 0 to `consumers` - 1.
        consumers: how many share the data set.
        start: samples of this consumer to leave out, as if they had been delivered before.
        block: samples of a shard that are permuted together; 1 to keep their order.
    """
    positions = unit_positions(
        dataset.unit_sizes, seed=seed, consumer=consumer, consumers=consumers, start=start
    )
    for epoch, unit, skip in positions:
        done = skip // block * block
        samples = dataset.read_unit(unit, done)
        while chunk := list(islice(samples, block)):
            order = _block_order(len(chunk), seed, epoch, unit, done)
            for place in order[max(skip - done, 0) :]:
                yield epoch, chunk[place]
            done += len(chunk)


def _block_order(size: int, *seed: int) -> np.ndarray:
    # In a folder each image is a block of its own.
    return np.zeros(1, int) if size == 1 else np.random.default_rng(seed).permutation(size)


def class_aware_stream(
    dataset: ClassificationDataset,
    *,
    seed: int,
    consumer: int,
    consumers: int,
    start: int = 0,
) -> Iterator[tuple[int, RawSample]]:
    """Yields samples with all classes equally often: pick a class, then an image of it.

    Shen et al. 2016, "Relay backpropagation": both the list of classes and each class's list of
    images are gone through in random order and reshuffled at their end. Classes without images are
    left out. The epoch that is yielded counts the passes over the class's list.

    Args:
        dataset: what to read; its samples are read one by one, so local or cached data is fast.
        seed: of all orders.
        consumer: 0 to `consumers` - 1.
        consumers: how many share the row of draws.
        start: samples of this consumer to leave out.
    """
    labels = dataset.labels()
    by_class = np.argsort(labels, kind="stable").astype(np.uint32)
    present, firsts = np.unique(labels[by_class], return_index=True)
    bounds = np.append(firsts, len(labels))
    orders: dict[int, tuple[int, np.ndarray]] = {}
    classes_of: tuple[int, np.ndarray] = (-1, present)
    draw = consumer + start * consumers
    while True:
        turn, place = divmod(draw, len(present))
        if classes_of[0] != turn:
            order = np.random.default_rng([seed, turn]).permutation(len(present))
            classes_of = (turn, order)
        which = int(classes_of[1][place])
        # A class is drawn once a turn, so the turn counts its images.
        begin, end = int(bounds[which]), int(bounds[which + 1])
        epoch, image = divmod(turn, end - begin)
        if orders.get(which, (-1,))[0] != epoch:
            rng = np.random.default_rng([seed, epoch, int(present[which])])
            orders[which] = (epoch, by_class[begin:end][rng.permutation(end - begin)])
        yield epoch, dataset.read_sample(int(orders[which][1][image]))
        draw += consumers


def share(total: int, consumer: int, consumers: int) -> tuple[int, int]:
    """The samples `[first, end)` of a consumer in evaluation: equal parts, in order."""
    return total * consumer // consumers, total * (consumer + 1) // consumers


def eval_stream(dataset: ClassificationDataset, first: int, end: int) -> Iterator[RawSample]:
    """Yields the samples `[first, end)` of the data set in order.

    Raises:
        UserError: the data holds fewer than its manifest says.
    """
    position = 0
    delivered = 0
    for unit, size in enumerate(dataset.unit_sizes.tolist()):
        if position >= end:
            break
        skip = max(first - position, 0)
        if skip < size:
            wanted = min(end - position, size) - skip
            # The last sample of a unit is not the unit's end: what comes after it is checked too.
            stop = None if skip + wanted == size else wanted
            for sample in islice(dataset.read_unit(unit, skip), stop):
                delivered += 1
                yield sample
        position += size
    if delivered != max(end - first, 0):
        raise UserError(
            f"{dataset.origin} delivered {delivered} of the samples {first} to {end - 1}, "
            f"expected {end - first}. The data is damaged; prepare it again."
        )
