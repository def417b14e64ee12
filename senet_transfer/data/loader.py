"""The loaders that classification trains and evaluates on.

Batches are made in worker processes: whole, uint8, with each image's own crop and flip. Batch `b`
of a rank is made by worker `b % num_workers`, as its `b // num_workers`-th, from the samples of its
own consumer (`stream`), number `rank * num_workers + worker` of `world_size * num_workers`. So the
content of batch `b` follows from b alone, and a run that resumes at iteration `b` with the same
seed, ranks, workers and batch size continues with the very batches that the unbroken run had.

Rank and world size are arguments: they are resolved in the main process, where they are known.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from senet_transfer.data.augment import EvalTransform, TrainTransform, sample_rng
from senet_transfer.data.classification import ClassificationDataset
from senet_transfer.data.decode import BrokenImageError
from senet_transfer.data.shards import RawSample
from senet_transfer.data.skips import SkipCounter
from senet_transfer.data.stream import (
    SHUFFLE_BLOCK,
    class_aware_stream,
    eval_stream,
    share,
    train_stream,
)
from senet_transfer.data.workers import init_worker
from senet_transfer.errors import UserError

Batch = dict[str, Any]
Transform = TrainTransform | EvalTransform | Callable[..., torch.Tensor]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Failed:
    """A UserError on its way from a worker: PyTorch would wrap its message in a traceback."""

    message: str


class ClassificationLoader:
    """Iterates over batches; what workers cannot go on with is raised as UserError.

    Attributes:
        skips: how many samples were seen and skipped so far on this rank.
        expected: samples that one pass delivers on this rank; None where there is no end.
    """

    def __init__(self, loader: DataLoader, skips: SkipCounter, expected: int | None, batches: int):
        self._loader = loader
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
            if isinstance(batch, _Failed):
                raise UserError(batch.message)
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
    prefetch_factor: int = 2,
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
        prefetch_factor: batches that each worker prepares ahead.
        pin_memory: for faster copies to a GPU.

    Raises:
        UserError: a number makes no sense; while iterating, damaged data.
    """
    _check_numbers(dataset, batch_size, rank, world_size, num_workers)
    if start_iter < 0 or seed < 0 or shuffle_block < 1 or not 0 <= max_skip_ratio <= 1:
        raise UserError(
            f"start_iter={start_iter}, seed={seed}, shuffle_block={shuffle_block}, "
            f"max_skip_ratio={max_skip_ratio}: expected no negative number, a block of at least 1 "
            "and a ratio of at most 1."
        )
    if class_aware:
        dataset.labels()  # loaded here, so that forked workers share it
    skips = SkipCounter(num_workers, max_skip_ratio)
    batches = _TrainBatches(
        dataset,
        transform,
        skips,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=max(num_workers, 1),
        start_iter=start_iter,
        class_aware=class_aware,
        shuffle_block=shuffle_block,
    )
    loader = _data_loader(batches, num_workers, prefetch_factor, pin_memory)
    return ClassificationLoader(loader, skips, None, 0)


def build_classification_eval_loader(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    transform: EvalTransform,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch_factor: int = 2,
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
        prefetch_factor: batches that each worker prepares ahead.
        pin_memory: for faster copies to a GPU.

    Raises:
        UserError: a number makes no sense; while iterating, damaged data.
    """
    _check_numbers(dataset, batch_size, rank, world_size, num_workers)
    workers = max(num_workers, 1)
    skips = SkipCounter(num_workers, 0.0)
    batches = _EvalBatches(
        dataset,
        transform,
        skips,
        batch_size=batch_size,
        rank=rank,
        ranks=world_size,
        workers=workers,
    )
    consumers = world_size * workers
    sizes = []
    for worker in range(workers):
        first, end = share(len(dataset), rank * workers + worker, consumers)
        sizes.append(end - first)
    loader = _data_loader(batches, num_workers, prefetch_factor, pin_memory)
    count = sum(-(-size // batch_size) for size in sizes)
    return ClassificationLoader(loader, skips, sum(sizes), count)


def _check_numbers(
    dataset: ClassificationDataset, batch_size: int, rank: int, world_size: int, num_workers: int
) -> None:
    if batch_size < 1 or num_workers < 0 or not 0 <= rank < world_size:
        raise UserError(
            f"batch_size={batch_size}, num_workers={num_workers}, rank={rank}, "
            f"world_size={world_size}: expected at least 1 image a batch, no negative number of "
            "workers and a rank below the world size."
        )
    if len(dataset) == 0:
        raise UserError(f"{dataset.origin} holds no images.")


def _data_loader(
    batches: IterableDataset, num_workers: int, prefetch_factor: int, pin_memory: bool
) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
        # Starting to iterate draws a number, here from a generator of its own: from torch's, the
        # first step of a resumed run would go on with others than that of the unbroken run.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class _TrainBatches(IterableDataset):
    """Makes the batches of one worker of one rank."""

    def __init__(
        self,
        dataset: ClassificationDataset,
        transform: Transform,
        skips: SkipCounter,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        workers: int,
        start_iter: int,
        class_aware: bool,
        shuffle_block: int,
    ):
        self.dataset = dataset
        self.transform = transform
        self.skips = skips
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.consumers = world_size * workers
        self.workers = workers
        self.start_iter = start_iter
        self.class_aware = class_aware
        self.shuffle_block = shuffle_block

    def __iter__(self) -> Iterator[Batch | _Failed]:
        info = get_worker_info()
        process = info.id if info else 0
        try:
            samples = self._samples(self.start_iter + process)
            while True:
                yield self._batch(list(islice(samples, self.batch_size)), process)
        except UserError as error:
            yield _Failed(str(error))

    def _samples(self, iteration: int) -> Iterator[tuple[int, RawSample]]:
        """The samples from a batch on, of the worker whose batch it is."""
        turn, worker = divmod(iteration, self.workers)
        place = {
            "seed": self.seed,
            "consumer": self.rank * self.workers + worker,
            "consumers": self.consumers,
            "start": turn * self.batch_size,
        }
        if self.class_aware:
            return class_aware_stream(self.dataset, **place)
        return train_stream(self.dataset, **place, block=self.shuffle_block)

    def _batch(self, samples: list[tuple[int, RawSample]], process: int) -> Batch:
        shape = (len(samples), *self.transform.output_shape)
        images = torch.empty(shape, dtype=torch.uint8)
        good: list[int] = []
        last = ""
        for place, (epoch, sample) in enumerate(samples):
            try:
                rng = sample_rng(self.seed, epoch, sample.key)
                images[place] = self.transform(sample.data, rng)
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


class _EvalBatches(IterableDataset):
    """Makes the evaluation batches of one worker of one rank."""

    def __init__(
        self,
        dataset: ClassificationDataset,
        transform: Transform,
        skips: SkipCounter,
        *,
        batch_size: int,
        rank: int,
        ranks: int,
        workers: int,
    ):
        self.dataset = dataset
        self.transform = transform
        self.skips = skips
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        self.workers = workers

    def __iter__(self) -> Iterator[Batch | _Failed]:
        info = get_worker_info()
        process = info.id if info else 0
        consumer = self.rank * self.workers + process
        first, end = share(len(self.dataset), consumer, self.ranks * self.workers)
        try:
            stream = eval_stream(self.dataset, first, end)
            while samples := list(islice(stream, self.batch_size)):
                places = list(range(first, first + len(samples)))
                yield {**self._batch(samples, process), "index": places}
                first += len(samples)
        except UserError as error:
            yield _Failed(str(error))

    def _batch(self, samples: list[RawSample], process: int) -> Batch:
        images = torch.empty(len(samples), *self.transform.output_shape, dtype=torch.uint8)
        for place, sample in enumerate(samples):
            try:
                images[place] = self.transform(sample.data)
            except BrokenImageError as error:
                raise UserError(
                    f"cannot decode {sample.key} in {sample.origin}: {error}. Evaluation needs "
                    "every image; restore it, or prepare the data again."
                ) from error
        self.skips.count(process, 0, len(samples))
        return _collate(images, samples)


def _collate(images: torch.Tensor, samples: list[RawSample]) -> Batch:
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return {"image": images, "label": labels, "key": [sample.key for sample in samples]}
