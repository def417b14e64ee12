"""Resumable sampling of training and evaluation data for data loader workers.

The training data is read by W data loader workers, which are numbered across all ranks. An epoch
consists of U units (shards or single images) in a random order that depends on the seed and the
epoch. The epochs form one infinite sequence: epoch e covers the positions e*U to (e+1)*U-1. Worker
w reads the positions g with g % W == w.

As a result, every worker gets data even if there are fewer shards than workers, and the workers
together read each epoch exactly once. A worker's state is determined by the number of samples it
has read. Only this number is required to resume.

The samples of a shard are shuffled in blocks. Only one block of encoded images is kept in memory,
and the position of every sample can be computed.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from senet_transfer.data.base import ClassificationDataset, RawSample
from senet_transfer.errors import UserError

SHUFFLE_BLOCK = 1024


def unit_positions(
    sizes: np.ndarray, *, seed: int, worker: int, num_workers: int, start: int = 0
) -> Iterator[tuple[int, int, int]]:
    """Yield the infinite sequence of shards or single images that one worker reads.

    Args:
        sizes: Number of samples per unit (shard or single image), `(U,)`.
        seed: Random seed of the order.
        worker: Index of the worker, counted across all ranks.
        num_workers: Total number of workers on all ranks.
        start: Number of samples that this worker skips.

    Yields:
        The epoch, the unit index, and the number of samples to skip at the start of the unit.
    """
    units = len(sizes)
    uniform = int(sizes[0]) if (sizes == sizes[0]).all() else None
    epoch = 0
    while True:
        first = (worker - epoch * units) % num_workers
        if uniform is not None:
            # If all units have the same size, epochs are skipped without computing their order.
            # This matters for folders with millions of images.
            total = len(range(first, units, num_workers)) * uniform
            if start >= total:
                start, epoch = start - total, epoch + 1
                continue
        order = np.random.default_rng([seed, epoch]).permutation(units)[first::num_workers]
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
    worker: int,
    num_workers: int,
    start: int = 0,
    block: int = SHUFFLE_BLOCK,
) -> Iterator[tuple[int, RawSample]]:
    """Yield the infinite sequence of (epoch, sample) pairs that one worker reads.

    Args:
        dataset: Training data.
        seed: Random seed of the order.
        worker: Index of the worker, counted across all ranks.
        num_workers: Total number of workers on all ranks.
        start: Number of samples that this worker skips because it has already read them.
        block: Number of samples of a shard that are shuffled together; 1 keeps their order.
    """
    positions = unit_positions(
        dataset.unit_sizes, seed=seed, worker=worker, num_workers=num_workers, start=start
    )
    for epoch, unit, skip in positions:
        done = skip // block * block
        samples = dataset.read_unit(unit, done)
        while chunk := list(islice(samples, block)):
            order = _block_order(len(chunk), seed, epoch, unit, done)
            for index in order[max(skip - done, 0) :]:
                yield epoch, chunk[index]
            done += len(chunk)


def _block_order(size: int, *seed: int) -> np.ndarray:
    # The units of a folder are single images, and creating a generator for each image would be
    # slow.
    return np.zeros(1, int) if size == 1 else np.random.default_rng(seed).permutation(size)


def class_aware_stream(
    dataset: ClassificationDataset, *, seed: int, draws: Iterable[int]
) -> Iterator[tuple[int, RawSample]]:
    """Yield (epoch, sample) pairs in which all classes are equally frequent.

    Sample a class, then one of its images, as in Shen et al. 2016, "Relay backpropagation". The
    class list and each class's image list are traversed in random order and reshuffled after each
    pass. Classes without images are skipped. A sample's epoch is the number of completed passes
    over the images of its class.

    Args:
        dataset: Training data. Samples are read one at a time. This is slow for remote data without
            a cache.
        seed: Random seed of the order.
        draws: Positions of the samples to yield in the infinite sequence of samples, counted from
            0. In any range of consecutive positions, the sample counts of any two classes differ by
            at most two.
    """
    labels = dataset.labels()
    by_class = np.argsort(labels, kind="stable").astype(np.uint32)
    present, firsts = np.unique(labels[by_class], return_index=True)
    bounds = np.append(firsts, len(labels))
    orders: dict[int, tuple[int, np.ndarray]] = {}
    classes_of: tuple[int, np.ndarray] = (-1, present)
    for draw in draws:
        turn, index = divmod(draw, len(present))
        if classes_of[0] != turn:
            order = np.random.default_rng([seed, turn]).permutation(len(present))
            classes_of = (turn, order)
        which = int(classes_of[1][index])
        # Each class is drawn once per turn, so the turn is also the class's number of previous
        # draws.
        begin, end = int(bounds[which]), int(bounds[which + 1])
        epoch, image = divmod(turn, end - begin)
        if orders.get(which, (-1,))[0] != epoch:
            rng = np.random.default_rng([seed, epoch, int(present[which])])
            orders[which] = (epoch, by_class[begin:end][rng.permutation(end - begin)])
        yield epoch, dataset.read_sample(int(orders[which][1][image]))


def share(total: int, worker: int, num_workers: int) -> tuple[int, int]:
    """Return one worker's sample range `[first, end)` when `total` samples are divided evenly."""
    return total * worker // num_workers, total * (worker + 1) // num_workers


def eval_stream(dataset: ClassificationDataset, first: int, end: int) -> Iterator[RawSample]:
    """Yield the samples of a dataset from index `first` to `end - 1`, in order.

    Raises:
        UserError: If the data contains fewer samples than its manifest specifies.
    """
    position = 0
    delivered = 0
    for unit, size in enumerate(dataset.unit_sizes.tolist()):
        if position >= end:
            break
        skip = max(first - position, 0)
        if skip < size:
            wanted = min(end - position, size) - skip
            # If the whole shard is read, its end is checked after the last sample.
            stop = None if skip + wanted == size else wanted
            for sample in islice(dataset.read_unit(unit, skip), stop):
                delivered += 1
                yield sample
        position += size
    if delivered != max(end - first, 0):
        raise UserError(
            f"{dataset.origin} contains only {delivered} of the samples {first} to {end - 1}; "
            f"expected {end - first}. The data is damaged. Prepare it again."
        )
