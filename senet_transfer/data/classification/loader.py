"""Data loaders for classification.

Worker processes build complete uint8 batches, with a random crop and flip for each image. Worker
`b % num_workers` of a rank builds batch `b` of the rank, as its `b // num_workers`-th batch. It
reads the samples of consumer `rank * num_workers + worker` of `world_size * num_workers` (see
`sampling`). The content of a batch therefore depends only on its index, and a run that is resumed
with the same seed, ranks, workers and batch size gets the same batches as an uninterrupted run.

Rank and world size are arguments, because worker processes do not know them.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from senet_transfer.data.base import ClassificationDataset, RawSample
from senet_transfer.data.classification.sampling import (
    SHUFFLE_BLOCK,
    class_aware_stream,
    eval_stream,
    share,
    train_stream,
)
from senet_transfer.data.classification.skip_counter import SkipCounter
from senet_transfer.data.images.decode import BrokenImageError
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform, put, sample_rng
from senet_transfer.data.workers import RaisingLoader, init_worker
from senet_transfer.errors import UserError

Batch = dict[str, Any]

logger = logging.getLogger(__name__)


class ClassificationLoader:
    """Iterator over batches that raises the UserErrors of worker processes.

    Attributes:
        skips: Counts of the samples seen and skipped on this rank.
        expected: Number of samples that one pass delivers on this rank; None for an infinite
            loader.
    """

    def __init__(self, loader: DataLoader, skips: SkipCounter, expected: int | None, batches: int):
        self._loader = RaisingLoader(loader)
        self._batches = batches
        self.skips = skips
        self.expected = expected

    def __len__(self) -> int:
        if self.expected is None:
            raise TypeError("the training loader is infinite and has no length")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        delivered = 0
        for batch in self._loader:
            delivered += len(batch["key"])
            yield batch
        if self.expected is not None and delivered != self.expected:
            raise UserError(
                f"evaluation delivered {delivered} images on this rank; expected {self.expected}. "
                "The data changed while it was read. Prepare it again."
            )


def build_classification_train_loader(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    transform: TrainTransform,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    start_iter: int = 0,
    class_aware: bool = False,
    shuffle_block: int = SHUFFLE_BLOCK,
    max_skip_ratio: float = 0.01,
    pin_memory: bool = False,
) -> ClassificationLoader:
    """Build an infinite loader of training batches.

    A batch is `{"image": uint8 (N, 3, H, W) RGB, "label": int64 (N,), "key": list[str]}`. A broken
    image is replaced with the next good one of its batch, so the order of the other samples does
    not change.

    Args:
        dataset: The training data.
        batch_size: Number of images per iteration on this rank.
        transform: Called with the encoded image and a random generator, which depends only on the
            seed, the epoch and the key of the sample.
        seed: Seed of the order and the augmentation; the same on all ranks.
        rank: Rank of this process.
        world_size: Number of processes.
        num_workers: Number of worker processes of this rank; 0 loads in this process.
        start_iter: The first iteration to deliver.
        class_aware: Draw a class, then one of its images, instead of iterating over all images.
        shuffle_block: Number of samples of a shard that are permuted together. Larger blocks need
            more memory.
        max_skip_ratio: Tolerated fraction of broken images, 0-1.
        pin_memory: Use pinned memory for faster copies to a GPU.

    Raises:
        UserError: If an argument is out of range or the data set is empty. Iterating also raises it
            for damaged data.
    """
    place = _Place(rank, world_size, num_workers)
    order = _Order(seed, start_iter, class_aware, shuffle_block)
    _check_batches(dataset, batch_size)
    if class_aware:
        dataset.labels()  # loaded before the workers are forked, so that they share the memory
    skips = SkipCounter(num_workers, max_skip_ratio)
    batches = _TrainBatches(dataset, transform, skips, batch_size, place, order)
    return ClassificationLoader(_data_loader(batches, num_workers, pin_memory), skips, None, 0)


def build_classification_eval_loader(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    transform: EvalTransform,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> ClassificationLoader:
    """Build a loader for evaluation that delivers each image once over all ranks and workers.

    A batch has the entries of training batches and `index`, the images' indices in the data set,
    `list[int]`. With ten crops, `image` is `(N, 10, 3, H, W)`. The last batch of a worker may be
    smaller, and the numbers of images on two ranks may differ by one. A broken image is an error,
    because skipping it would change the metrics. The number of delivered images is checked.

    Args:
        dataset: The data to evaluate on.
        batch_size: Number of images per batch.
        transform: Called with the encoded image.
        rank: Rank of this process.
        world_size: Number of processes.
        num_workers: Number of worker processes of this rank; 0 loads in this process.
        pin_memory: Use pinned memory for faster copies to a GPU.

    Raises:
        UserError: If an argument is out of range or the data set is empty. Iterating also raises it
            for damaged data.
    """
    place = _Place(rank, world_size, num_workers)
    _check_batches(dataset, batch_size)
    skips = SkipCounter(num_workers, 0.0)
    batches = _EvalBatches(dataset, transform, skips, batch_size, place)
    sizes = [end - first for first, end in map(batches.share, range(place.processes))]
    loader = _data_loader(batches, num_workers, pin_memory)
    count = sum(-(-size // batch_size) for size in sizes)
    return ClassificationLoader(loader, skips, sum(sizes), count)


@dataclass(frozen=True)
class _Place:
    """Rank, world size and number of worker processes; with 0 workers, the rank reads itself."""

    rank: int
    world_size: int
    workers: int

    def __post_init__(self) -> None:
        if self.workers < 0 or not 0 <= self.rank < self.world_size:
            raise UserError(
                f"num_workers={self.workers}, rank={self.rank}, world_size={self.world_size}; "
                "expected 0 or more workers and a rank from 0 to the world size minus 1."
            )

    @property
    def processes(self) -> int:
        """Number of processes that read for this rank."""
        return max(self.workers, 1)

    @property
    def consumers(self) -> int:
        """Number of processes that read for all ranks."""
        return self.world_size * self.processes

    def consumer(self, worker: int) -> int:
        """Return the index of a worker of this rank among all consumers."""
        return self.rank * self.processes + worker


@dataclass(frozen=True)
class _Order:
    """Parameters of the order of training samples."""

    seed: int
    start_iter: int
    class_aware: bool
    shuffle_block: int

    def __post_init__(self) -> None:
        if self.start_iter < 0 or self.seed < 0 or self.shuffle_block < 1:
            raise UserError(
                f"start_iter={self.start_iter}, seed={self.seed}, "
                f"shuffle_block={self.shuffle_block}; expected 0 or more, and a block of at least "
                "1 sample."
            )


def _check_batches(dataset: ClassificationDataset, batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}; expected at least 1 image per batch.")
    if len(dataset) == 0:
        raise UserError(f"{dataset.origin} contains no images. Choose another data set.")


def _data_loader(batches: IterableDataset, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
        # Creating an iterator draws a random number. A separate generator keeps this from
        # advancing PyTorch's global one, which would change the first step of a resumed run.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(eq=False)
class _TrainBatches(IterableDataset):
    """Training batches of one worker of one rank."""

    dataset: ClassificationDataset
    transform: TrainTransform
    skips: SkipCounter
    batch_size: int
    place: _Place
    order: _Order

    def __iter__(self) -> Iterator[Batch | UserError]:
        process = _worker()
        try:
            samples = self._samples(self.order.start_iter + process)
            while True:
                yield self._batch(list(islice(samples, self.batch_size)), process)
        except UserError as error:
            yield error

    def _samples(self, iteration: int) -> Iterator[tuple[int, RawSample]]:
        """Return the samples of the worker that builds a batch, from this batch on."""
        turn, worker = divmod(iteration, self.place.processes)
        row = {
            "seed": self.order.seed,
            "consumer": self.place.consumer(worker),
            "consumers": self.place.consumers,
            "start": turn * self.batch_size,
        }
        if self.order.class_aware:
            return class_aware_stream(self.dataset, **row)
        return train_stream(self.dataset, **row, block=self.order.shuffle_block)

    def _batch(self, samples: list[tuple[int, RawSample]], process: int) -> Batch:
        shape = (len(samples), *self.transform.output_shape)
        images = torch.empty(shape, dtype=torch.uint8)
        good: list[int] = []
        last = ""
        for place, (epoch, sample) in enumerate(samples):
            try:
                rng = sample_rng(self.order.seed, epoch, sample.key)
                put(self.transform(sample.data, rng), images[place])
                good.append(place)
            except BrokenImageError as error:
                last = f"{sample.key} in {sample.origin} ({error})"
                logger.warning("skipping a broken image: %s", last)
        self.skips.count(process, len(samples) - len(good), len(samples))
        if len(good) < len(samples):
            self.skips.check(last)
            self._fill(images, samples, good, last)
        return _collate(images, [sample for _, sample in samples])

    def _fill(
        self, images: torch.Tensor, samples: list[tuple[int, RawSample]], good: list[int], last: str
    ) -> None:
        """Replace each broken sample with the next good one of the batch, or else the first."""
        if not good:
            raise UserError(
                f"all {len(samples)} images of a batch are broken; the last one is {last}. Verify "
                "the data."
            )
        for place in set(range(len(samples))).difference(good):
            other = next((index for index in good if index > place), good[0])
            images[place] = images[other]
            samples[place] = samples[other]


@dataclass(eq=False)
class _EvalBatches(IterableDataset):
    """Evaluation batches of one worker of one rank."""

    dataset: ClassificationDataset
    transform: EvalTransform
    skips: SkipCounter
    batch_size: int
    place: _Place

    def share(self, worker: int) -> tuple[int, int]:
        """Return the range `[first, end)` of a worker's samples."""
        return share(len(self.dataset), self.place.consumer(worker), self.place.consumers)

    def __iter__(self) -> Iterator[Batch | UserError]:
        process = _worker()
        first, end = self.share(process)
        try:
            stream = eval_stream(self.dataset, first, end)
            while samples := list(islice(stream, self.batch_size)):
                places = list(range(first, first + len(samples)))
                yield {**self._batch(samples, process), "index": places}
                first += len(samples)
        except UserError as error:
            yield error

    def _batch(self, samples: list[RawSample], process: int) -> Batch:
        images = torch.empty(len(samples), *self.transform.output_shape, dtype=torch.uint8)
        for place, sample in enumerate(samples):
            try:
                put(self.transform(sample.data), images[place])
            except BrokenImageError as error:
                raise UserError(
                    f"cannot decode {sample.key} in {sample.origin}: {error}. Evaluation requires "
                    "all images. Restore it, or prepare the data again."
                ) from error
        self.skips.count(process, 0, len(samples))
        return _collate(images, samples)


def _worker() -> int:
    """Return the index of this worker process, or 0 in the main process."""
    info = get_worker_info()
    return info.id if info else 0


def _collate(images: torch.Tensor, samples: list[RawSample]) -> Batch:
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return {"image": images, "label": labels, "key": [sample.key for sample in samples]}
