"""Detection's training loader: Detectron2's images, sampler and grouping, from any iteration on.

Detectron2's own loader draws augmentation from random numbers that go on from image to image within
a worker, and groups images by shape after they are read; neither can be taken up in the middle.
Here the batches are planned from widths and heights before an image is read, and each image draws
from numbers of its own. So the content of a batch follows from seed, rank and iteration alone,
whatever the number of workers.
"""

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MapDataset, build_detection_test_loader, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from senet_transfer.data.workers import ErrorsAsValues, RaisingLoader, init_worker
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)

# A place in the row of all images that a process trains on, and which image is there.
Place = tuple[int, int]

# Over a set of images: a schedule of more is hardly meant for that set.
MANY_PASSES = 500

# Tells the random numbers of an image from those of a step, which have a seed and a rank, too.
_IMAGES = 1


def seed_generators(*entropy: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch, those of GPUs among them."""
    seed = _seed_libraries(entropy)
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed formats a traceback for each kind of device that is not in use.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _seed_libraries(entropy: Iterable[int]) -> int:
    seed = int(np.random.SeedSequence(tuple(entropy)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    return seed


@contextlib.contextmanager
def seeded_rng(*entropy: int) -> Iterator[None]:
    """Seed the CPU's generators inside the context, and restore their states after it.

    Args:
        entropy: whole numbers, which the seed is derived from.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # torch.manual_seed would seed GPUs, too, for good.
    torch.default_generator.manual_seed(_seed_libraries(entropy))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def build_train_loader(
    cfg: CfgNode, mapper: Callable[[dict], dict], *, seed: int, start_iter: int = 0
) -> RaisingLoader:
    """Return the loader of this process: an endless row of lists of what the mapper returns.

    Args:
        cfg: Detectron2's keys of data, sampler and grouping are obeyed.
        mapper: of one image's dictionary.
        seed: of order and augmentation; the same in all processes.
        start_iter: the first iteration to deliver.
    """
    # Detectron2's samplers that are given no seed draw one.
    with seeded_rng(seed):
        theirs = build_detection_train_loader(cfg, mapper=_unmapped)
    grouped = isinstance(theirs, AspectRatioGroupedDataset)
    parts = (theirs.dataset if grouped else theirs).dataset
    records = parts.dataset
    _tell_passes(cfg, len(records))
    batches = PlannedBatches(
        parts.sampler,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        is_wide=_shapes(records) if grouped else None,
        start_iter=start_iter,
    )
    images = MapDataset(records, ErrorsAsValues(mapper))
    loader = DataLoader(
        _SeededImages(images, seed, comm.get_rank()),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=init_worker,
        # Starting to iterate draws a number, here from a generator of its own.
        generator=torch.Generator(),
    )
    return RaisingLoader(loader)


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Callable[[dict], dict]
) -> RaisingLoader:
    """Return Detectron2's loader of a data set to evaluate on.

    Args:
        cfg: Detectron2's keys of data loading are obeyed.
        dataset_name: a registered data set.
        mapper: of one image's dictionary.
    """
    loader = build_detection_test_loader(cfg, dataset_name, mapper=ErrorsAsValues(mapper))
    loader.worker_init_fn = init_worker
    return RaisingLoader(loader)


def _unmapped(record: dict) -> dict:
    return record


def _tell_passes(cfg: CfgNode, images: int) -> None:
    # COCO's schedules on a small set of one's own go on for days after all is learnt.
    solver = cfg.SOLVER
    passes = solver.MAX_ITER * solver.IMS_PER_BATCH / images
    facts = (solver.MAX_ITER, solver.IMS_PER_BATCH, passes, images)
    if passes <= MANY_PASSES:
        logger.info("%d steps of %d images: %.3g passes over %d images.", *facts)
        return
    logger.warning(
        "%d steps of %d images are %.0f passes over only %d images; the paper's schedule on COCO "
        "has 24. SOLVER.MAX_ITER and SOLVER.STEPS shorten it.", *facts
    )  # fmt: skip


def _shapes(records: Dataset) -> Callable[[int], bool]:
    """Return a function that says of an image whether it is wider than high.

    Detectron2 groups images by that.
    """

    @functools.cache
    def is_wide(index: int) -> bool:
        record = records[index]
        if not {"width", "height"} <= record.keys():
            raise UserError(
                f"The record of {record.get('file_name', 'an image')} has no width and height, by "
                "which DATALOADER.ASPECT_RATIO_GROUPING groups images. Add them to the data set, "
                "or set the key to False."
            )
        return record["width"] > record["height"]

    return is_wide


class PlannedBatches(Sampler[list[Place]]):
    """The batches of a process: which images, in which places of its row.

    With shapes, as Detectron2's AspectRatioGroupedDataset: an image waits until there are enough of
    its kind.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        *,
        batch_size: int,
        is_wide: Callable[[int], bool] | None = None,
        start_iter: int = 0,
    ):
        """
        Args:
            sampler: an endless row of images, the same each time.
            batch_size: images of this process a step.
            is_wide: the kind of an image; None where images of all kinds go together.
            start_iter: the first batch to yield.
        """
        self.sampler, self.batch_size, self.is_wide = sampler, batch_size, is_wide
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[Place]]:
        return islice(self._all(), self.start_iter, None)

    def _all(self) -> Iterator[list[Place]]:
        waiting: dict[bool, list[Place]] = {False: [], True: []}
        for place in enumerate(self.sampler):
            kind = waiting[bool(self.is_wide and self.is_wide(place[1]))]
            kind.append(place)
            if len(kind) == self.batch_size:
                yield kind.copy()
                kind.clear()


class _SeededImages(Dataset):
    """Maps images with random numbers that follow from their places."""

    def __init__(self, images: Dataset, seed: int, rank: int):
        self.images, self.seed, self.rank = images, seed, rank

    def __getitem__(self, place: Place) -> Any:
        position, index = place
        with seeded_rng(self.seed, self.rank, position, _IMAGES):
            return self.images[index]
