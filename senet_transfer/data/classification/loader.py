"""The loaders that classification trains and evaluates on.

Batches are made in worker processes: whole, uint8, with each image's own crop and flip. Batch `b`
of a rank is made by worker `b % num_workers`, as its `b // num_workers`-th, from the samples of its
own consumer (`stream`), number `rank * num_workers + worker` of `world_size * num_workers`. So the
content of batch `b` follows from b alone, and a run that resumes at iteration `b` with the same
seed, ranks, workers and batch size continues with the very batches that the unbroken run had.

Rank and world size are arguments: they are resolved in the main process, where they are known.
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
    """Iterates over batches; what workers cannot go on with is raised as UserError.

    Attributes:
        skips: how many samples were seen and skipped so far on this rank.
        expected: samples that one pass delivers on this rank; None where there is no end.
    """

    def __init__(self, loader: DataLoader, skips: SkipCounter, expected: int | None, batches: int):
        self._loader = RaisingLoader(loader)
        self._batches = batches
        self.skips = skips
        self.expected = expected

    def __len__(self) -> int:
        if self.expected is None:
            raise TypeError("training batches have no end; the number of iterations decides")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        delivered = 0
        for batch in self._loader:
            delivered += len(batch["key"])
            yield batch
        if self.expected is not None and delivered != self.expected:
            raise UserError(
                f"evaluation delivered {delivered} images on this rank, expected {self.expected}. "
                "The data changed while it was read; prepare it again."
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
    """An endless loader of training batches.

    A batch is `{"image": uint8 (N, 3, H, W) RGB, "label": int64 (N,), "key": list[str]}`. The place
    of a broken image is taken by the next good one of its batch, so positions stay what they are.

    Args:
        dataset: what to read.
        batch_size: images of this rank a step.
        transform: called with the encoded image and its random numbers, which follow from seed,
            epoch and key alone.
        seed: of order and augmentation; the same on all ranks.
        rank: of this process.
        world_size: number of processes.
        num_workers: worker processes of this rank; 0 to load in this process.
        start_iter: the first iteration to deliver.
        class_aware: draw a class, then an image, rather than go through all images.
        shuffle_block: samples of a shard that are permuted together; larger costs memory.
        max_skip_ratio: broken images beyond this share, 0-1, are an error.
        pin_memory: for faster copies to a GPU.

    Raises:
        UserError: a number makes no sense; while iterating, damaged data.
    """
    place = _Place(rank, world_size, num_workers)
    order = _Order(seed, start_iter, class_aware, shuffle_block)
    _check_batches(dataset, batch_size)
    if class_aware:
        dataset.labels()  # loaded here, so that forked workers share it
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
    """A loader of one pass over a data set, each image exactly once over all ranks and workers.

    Batches are as in training, `image` being `(N, 10, 3, H, W)` for ten crops, with the images'
    places in the data set as `index`, `list[int]`; the last of a worker can be smaller, and ranks
    can differ by an image. A broken image is an error: leaving it
    out would change the numbers. What was delivered is counted against the manifest.

    Args:
        dataset: what to read.
        batch_size: images a batch.
        transform: called with the encoded image.
        rank: of this process.
        world_size: number of processes.
        num_workers: worker processes of this rank; 0 to load in this process.
        pin_memory: for faster copies to a GPU.

    Raises:
        UserError: a number makes no sense; while iterating, damaged data.
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
    """A rank among all, and the worker processes that read for it; 0: it reads itself."""

    rank: int
    world_size: int
    workers: int

    def __post_init__(self) -> None:
        if self.workers < 0 or not 0 <= self.rank < self.world_size:
            raise UserError(
                f"num_workers={self.workers}, rank={self.rank}, world_size={self.world_size}: "
                "expected no negative number of workers and a rank below the world size."
            )

    @property
    def processes(self) -> int:
        """How many read for this rank."""
        return max(self.workers, 1)

    @property
    def consumers(self) -> int:
        """How many read, of all ranks."""
        return self.world_size * self.processes

    def consumer(self, worker: int) -> int:
        """The number of a worker of this rank among all consumers."""
        return self.rank * self.processes + worker


@dataclass(frozen=True)
class _Order:
    """Which samples come when in training."""

    seed: int
    start_iter: int
    class_aware: bool
    shuffle_block: int

    def __post_init__(self) -> None:
        if self.start_iter < 0 or self.seed < 0 or self.shuffle_block < 1:
            raise UserError(
                f"start_iter={self.start_iter}, seed={self.seed}, "
                f"shuffle_block={self.shuffle_block}: expected no negative number, and a block of "
                "at least 1."
            )


def _check_batches(dataset: ClassificationDataset, batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: expected at least 1 image a batch.")
    if len(dataset) == 0:
        raise UserError(f"{dataset.origin} holds no images.")


def _data_loader(batches: IterableDataset, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
        # Starting to iterate draws a number, here from a generator of its own: from torch's, the
        # first step of a resumed run would go on with others than that of the unbroken run.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(eq=False)
class _TrainBatches(IterableDataset):
    """Makes the batches of one worker of one rank."""

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
        """The samples from a batch on, of the worker whose batch it is."""
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
        """Puts the next good sample of the batch, or the first, in the place of each broken one."""
        if not good:
            raise UserError(f"all {len(samples)} images of a batch are broken; the last: {last}.")
        for place in set(range(len(samples))).difference(good):
            other = next((index for index in good if index > place), good[0])
            images[place] = images[other]
            samples[place] = samples[other]


@dataclass(eq=False)
class _EvalBatches(IterableDataset):
    """Makes the evaluation batches of one worker of one rank."""

    dataset: ClassificationDataset
    transform: EvalTransform
    skips: SkipCounter
    batch_size: int
    place: _Place

    def share(self, worker: int) -> tuple[int, int]:
        """The samples `[first, end)` of a worker."""
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
                    f"cannot decode {sample.key} in {sample.origin}: {error}. Evaluation needs "
                    "every image; restore it, or prepare the data again."
                ) from error
        self.skips.count(process, 0, len(samples))
        return _collate(images, samples)


def _worker() -> int:
    """The number of this worker process; 0 where the rank reads itself."""
    info = get_worker_info()
    return info.id if info else 0


def _collate(images: torch.Tensor, samples: list[RawSample]) -> Batch:
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return {"image": images, "label": labels, "key": [sample.key for sample in samples]}
