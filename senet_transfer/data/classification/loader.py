"""Data loaders for image classification.

Worker processes build complete uint8 batches, with a random crop and flip for each image. The
workers of a rank take turns: worker `b % num_workers` builds batch `b`.

The training data is divided among the `world_size * num_workers` workers of all ranks; see
:mod:`~senet_transfer.data.classification.sampling`. The global index of worker `w` of rank `r` is
`r * num_workers + w`. A run that is resumed with the same seed, ranks, workers and batch size gets
the same batches as an uninterrupted run.

The rank and the world size are passed as arguments, so that worker processes do not depend on
`torch.distributed`.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
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
from senet_transfer.data.images.multi_scale import MultiScaleTransform, pack
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform, put, sample_rng
from senet_transfer.data.workers import RaisingLoader, init_worker
from senet_transfer.errors import UserError

Batch = dict[str, Any]

logger = logging.getLogger(__name__)


class ClassificationLoader:
    """Batch iterator that re-raises UserErrors from worker processes in the main process.

    Attributes:
        skips: Counter of the samples seen and skipped on this rank.
        expected: Number of samples per pass on this rank; None for an infinite loader.
    """

    def __init__(self, loader: DataLoader, skips: SkipCounter, expected: int | None, batches: int):
        self._loader = RaisingLoader(loader)
        self._batches = batches
        self.skips = skips
        self.expected = expected

    def __len__(self) -> int:
        if self.expected is None:
            raise TypeError("The training loader is infinite and has no length")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        delivered = 0
        for batch in self._loader:
            delivered += len(batch["key"])
            yield batch
        if self.expected is not None and delivered != self.expected:
            raise UserError(
                f"Evaluation loaded {delivered} images on this rank; expected {self.expected}. "
                "The data changed during evaluation. Prepare it again."
            )


def build_classification_train_loader(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    transform: TrainTransform | EvalTransform,
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
    image is replaced with the next valid image in its batch, so the order of the other samples does
    not change.

    Args:
        dataset: Training data.
        batch_size: Number of images per iteration on this rank.
        transform: Transform that is called with the encoded image and a random generator that
            depends only on the seed, the epoch and the sample key.
        seed: Random seed of the order and augmentation; must be the same on all ranks.
        rank: Rank of this process.
        world_size: Number of processes.
        num_workers: Number of worker processes on this rank; 0 loads the data in the main process.
        start_iter: Iteration to start from.
        class_aware: Whether to sample a class, then one of its images, instead of iterating over
            all images.
        shuffle_block: Number of samples of a shard that are shuffled together. Larger blocks
            require more memory.
        max_skip_ratio: Tolerated fraction of broken images, 0-1.
        pin_memory: Whether to use pinned memory for faster copies to a GPU.

    Raises:
        UserError: If an argument is out of range or the dataset is empty. Also raised during
            iteration if the data is damaged.
    """
    readers = _Readers(rank, world_size, num_workers)
    order = _Order(seed, start_iter, class_aware, shuffle_block)
    _check_batches(dataset, batch_size)
    if class_aware:
        dataset.labels()  # loaded before the workers are forked, so they share the memory
    skips = SkipCounter(num_workers, max_skip_ratio)
    batches = _TrainBatches(dataset, transform, skips, batch_size, readers, order)
    return ClassificationLoader(_data_loader(batches, num_workers, pin_memory), skips, None, 0)


def build_classification_eval_loader(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    transform: EvalTransform | MultiScaleTransform,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> ClassificationLoader:
    """Build an evaluation loader that loads each image once across all ranks and workers.

    In addition to the entries of a training batch, each batch contains `index`, the image indices
    in the dataset (`list[int]`), and `path`, the image paths (`list[str]`). With V crops per
    image, the shape of `image` is `(N, V, 3, H, W)`. If whole images of different sizes are
    evaluated, `image` is a flat tensor and `shapes` contains the image shapes; see
    :func:`~senet_transfer.data.images.multi_scale.pack`.

    The last batch of a worker may be smaller. The number of images may differ by one between
    ranks. A broken image raises an error, because skipping it would change the metrics. Loading a
    wrong number of images also raises an error.

    Args:
        dataset: Evaluation data.
        batch_size: Number of images per batch.
        transform: Transform that is called with the encoded image.
        rank: Rank of this process.
        world_size: Number of processes.
        num_workers: Number of worker processes on this rank; 0 loads the data in the main process.
        pin_memory: Whether to use pinned memory for faster copies to a GPU.

    Raises:
        UserError: If an argument is out of range or the dataset is empty. Also raised during
            iteration if the data is damaged.
    """
    readers = _Readers(rank, world_size, num_workers)
    _check_batches(dataset, batch_size)
    skips = SkipCounter(num_workers, 0.0)
    batches = _EvalBatches(dataset, transform, skips, batch_size, readers)
    sizes = [end - first for first, end in map(batches.share, range(readers.processes))]
    loader = _data_loader(batches, num_workers, pin_memory)
    total = sum(-(-size // batch_size) for size in sizes)
    return ClassificationLoader(loader, skips, sum(sizes), total)


@dataclass(frozen=True)
class _Readers:
    """Reader processes of all ranks. With 0 workers, each rank's main process reads the data."""

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
        """Number of reader processes on this rank."""
        return max(self.workers, 1)

    @property
    def total(self) -> int:
        """Number of reader processes on all ranks."""
        return self.world_size * self.processes

    def global_index(self, worker: int) -> int:
        """Return the global index of one of this rank's workers, counted across all ranks."""
        return self.rank * self.processes + worker


@dataclass(frozen=True)
class _Order:
    """Parameters that determine the order of training samples."""

    seed: int
    start_iter: int
    class_aware: bool
    shuffle_block: int

    def __post_init__(self) -> None:
        if self.start_iter < 0 or self.seed < 0 or self.shuffle_block < 1:
            raise UserError(
                f"start_iter={self.start_iter}, seed={self.seed}, "
                f"shuffle_block={self.shuffle_block}; expected a start_iter and seed of at least "
                "0 and a shuffle_block of at least 1."
            )


def _check_batches(dataset: ClassificationDataset, batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}; expected at least 1 image per batch.")
    if len(dataset) == 0:
        raise UserError(f"{dataset.origin} contains no images. Choose a different dataset.")


def _data_loader(batches: IterableDataset, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
        # Creating an iterator draws a random number. A separate generator is used, because
        # advancing PyTorch's global generator would change the first step of a resumed run.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(eq=False)
class _TrainBatches(IterableDataset):
    """Iterable over one worker's training batches."""

    dataset: ClassificationDataset
    transform: TrainTransform | EvalTransform
    skips: SkipCounter
    batch_size: int
    readers: _Readers
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
        """Return an infinite iterator over (epoch, sample) pairs for one worker.

        Args:
            iteration: Training iteration of the worker's first batch. It determines which samples
                the worker reads.
        """
        readers, order = self.readers, self.order
        if order.class_aware:
            # The ranks draw from one sequence, so the classes are balanced across their batches.
            firsts = (
                (step * readers.world_size + readers.rank) * self.batch_size
                for step in count(iteration, readers.processes)
            )
            draws = (first + index for first in firsts for index in range(self.batch_size))
            return class_aware_stream(self.dataset, seed=order.seed, draws=draws)
        turn, worker = divmod(iteration, readers.processes)
        return train_stream(
            self.dataset,
            seed=order.seed,
            worker=readers.global_index(worker),
            num_workers=readers.total,
            start=turn * self.batch_size,
            block=order.shuffle_block,
        )

    def _batch(self, samples: list[tuple[int, RawSample]], process: int) -> Batch:
        shape = (len(samples), *self.transform.output_shape)
        images = torch.empty(shape, dtype=torch.uint8)
        good: list[int] = []
        last = ""
        for row, (epoch, sample) in enumerate(samples):
            try:
                rng = sample_rng(self.order.seed, epoch, sample.key)
                put(self.transform(sample.data, rng), images[row])
                good.append(row)
            except BrokenImageError as error:
                last = f"{sample.key} in {sample.origin} ({error})"
                logger.warning("Skipping a broken image: %s", last)
        self.skips.count(process, len(samples) - len(good), len(samples))
        if len(good) < len(samples):
            self.skips.check(last)
            self._fill(images, samples, good, last)
        return _collate(images, [sample for _, sample in samples])

    def _fill(
        self, images: torch.Tensor, samples: list[tuple[int, RawSample]], good: list[int], last: str
    ) -> None:
        """Replace each broken sample in a batch with the next valid sample, wrapping around."""
        if not good:
            raise UserError(
                f"All {len(samples)} images of a batch are broken; the last one is {last}. "
                "Expected at least one valid image per batch. Replace the broken images, or "
                "prepare the data again."
            )
        for row in set(range(len(samples))).difference(good):
            other = next((index for index in good if index > row), good[0])
            images[row] = images[other]
            samples[row] = samples[other]


@dataclass(eq=False)
class _EvalBatches(IterableDataset):
    """Iterable over one worker's evaluation batches."""

    dataset: ClassificationDataset
    transform: EvalTransform | MultiScaleTransform
    skips: SkipCounter
    batch_size: int
    readers: _Readers

    def share(self, worker: int) -> tuple[int, int]:
        """Return a worker's sample range `[first, end)`."""
        return share(len(self.dataset), self.readers.global_index(worker), self.readers.total)

    def __iter__(self) -> Iterator[Batch | UserError]:
        process = _worker()
        first, end = self.share(process)
        try:
            stream = eval_stream(self.dataset, first, end)
            while samples := list(islice(stream, self.batch_size)):
                indices = list(range(first, first + len(samples)))
                paths = [sample.path for sample in samples]
                yield {**self._batch(samples, process), "index": indices, "path": paths}
                first += len(samples)
        except UserError as error:
            yield error

    def _batch(self, samples: list[RawSample], process: int) -> Batch:
        shape = self.transform.output_shape
        images = torch.empty(len(samples), *(shape or ()), dtype=torch.uint8)
        whole: list[list[torch.Tensor]] = []
        for row, sample in enumerate(samples):
            try:
                views = self.transform(sample.data)
            except BrokenImageError as error:
                raise UserError(
                    f"Cannot decode {sample.key} in {sample.origin}: {error}. Evaluation requires "
                    "all images. Restore the image, or prepare the data again."
                ) from error
            if shape is None:
                whole.append(views)
            else:
                put(views, images[row])
        self.skips.count(process, 0, len(samples))
        batch = _collate(images, samples)
        return batch if shape is not None else {**batch, **pack(whole)}


def _worker() -> int:
    """Return the index of this worker process, or 0 in the main process."""
    info = get_worker_info()
    return info.id if info else 0


def _collate(images: torch.Tensor, samples: list[RawSample]) -> Batch:
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return {"image": images, "label": labels, "key": [sample.key for sample in samples]}
