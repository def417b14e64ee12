"""Resumable data loader for detection, with Detectron2's datasets, samplers and grouping.

Detectron2's own loader uses one random generator per worker for augmentation and groups images by
aspect ratio after reading them, so it cannot be resumed in the middle of an epoch. This loader
groups images by their annotated sizes before reading them, and seeds the random generators
separately for each image. A batch depends only on the seed, rank and iteration, not on the number
of workers.
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
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from senet_transfer.data.classification.skip_counter import SkipCounter
from senet_transfer.data.detection.augmentation.copy_paste import CopyPaste
from senet_transfer.data.detection.mapper import UnreadableImageError
from senet_transfer.data.workers import ErrorsAsValues, RaisingLoader, init_worker
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)

# Position in a process's sequence of training images, and index of this image in the dataset.
SampledIndex = tuple[int, int]

# A schedule with more epochs than this is probably a mistake.
MANY_EPOCHS = 500

# Separates the random streams for images from those for training steps, which also depend on the
# seed and the rank.
_IMAGES = 1

_DATA_CHECK = "`senet data check` lists all unreadable images of a dataset."


def seed_generators(*entropy: int) -> None:
    """Seed the random generators of Python, NumPy and PyTorch, including those on GPUs."""
    seed = _seed_libraries(entropy)
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed is slow: it formats a traceback for each unused device type.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _seed_libraries(entropy: Iterable[int]) -> int:
    seed = int(np.random.SeedSequence(tuple(entropy)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    return seed


@contextlib.contextmanager
def seeded_rng(*entropy: int) -> Iterator[None]:
    """Seed the CPU random generators inside the context, and restore their states on exit.

    Args:
        entropy: Integers from which the seed is derived.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # torch.manual_seed would also seed GPUs, whose state is not restored.
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
    """Build the infinite training loader of this process.

    Each batch is a list of the mapper's outputs.

    Args:
        cfg: Config with Detectron2's keys for datasets, sampler and grouping.
        mapper: Function that converts a dataset dict to a model input.
        seed: Random seed for the image order and augmentation; must be the same in all processes.
        start_iter: Index of the first iteration.
    """
    # Detectron2's samplers choose a random seed if none is given. Only the
    # RepeatFactorTrainingSampler uses the seed in the config, where -1 means a random seed.
    seeded = cfg.clone()
    seeded.defrost()
    seeded.SEED = seed
    with seeded_rng(seed):
        theirs = _build_detectron2_loader(seeded)
    grouped = isinstance(theirs, AspectRatioGroupedDataset)
    parts = (theirs.dataset if grouped else theirs).dataset
    records = parts.dataset
    if cfg.SOLVER.get("EPOCHS") is None:
        _log_epochs(cfg, len(records))
    batches = PlannedBatches(
        parts.sampler,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        is_wide=_shapes(records) if grouped else None,
        start_iter=start_iter,
    )
    images: Dataset = MapDataset(records, ErrorsAsValues(mapper))
    if cfg.INPUT.get("COPY_PASTE", 0):
        images = CopyPaste(images, cfg.INPUT.COPY_PASTE)
    skips = SkipCounter(cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.get("MAX_SKIP_RATIO", 0.0))
    loader = DataLoader(
        _SeededImages(images, seed, comm.get_rank(), skips),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=init_worker,
        # Creating an iterator draws a random number. A separate generator is used to avoid
        # advancing PyTorch's global generator.
        generator=torch.Generator(),
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )
    return RaisingLoader(loader)


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Callable[[dict], dict]
) -> RaisingLoader:
    """Build Detectron2's evaluation loader for a dataset.

    Args:
        cfg: Config with Detectron2's keys for data loading.
        dataset_name: Name of a registered dataset.
        mapper: Function that converts a dataset dict to a model input.
    """
    loader = build_detection_test_loader(cfg, dataset_name, mapper=ErrorsAsValues(mapper))
    loader.worker_init_fn = init_worker
    return RaisingLoader(loader)


def _build_detectron2_loader(cfg: CfgNode) -> Any:
    try:
        return build_detection_train_loader(cfg, mapper=_unmapped)
    except AssertionError as error:
        # Detectron2 removes images without objects, and asserts that any images remain.
        raise UserError(
            f"The training data {', '.join(cfg.DATASETS.TRAIN)} can't be used: {error} Expected "
            "at least one image with an object that is not a crowd (with MODEL.KEYPOINT_ON, also "
            f"with at least {cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE} visible "
            "keypoints). Check the annotations."
        ) from error


def _unmapped(record: dict) -> dict:
    return record


def _log_epochs(cfg: CfgNode, images: int) -> None:
    # Users may forget to shorten a COCO schedule for a small dataset.
    solver = cfg.SOLVER
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / images
    values = (solver.MAX_ITER, solver.IMS_PER_BATCH, epochs, images)
    if epochs <= MANY_EPOCHS:
        logger.info(
            "Training for %d iterations with %d images per step corresponds to %.3g epochs of %d "
            "images.",
            *values,
        )
        return
    logger.warning(
        "Training for %d iterations with %d images per step corresponds to %.0f epochs of only %d "
        "images. The COCO recipes train for 24 epochs. Reduce SOLVER.MAX_ITER and SOLVER.STEPS to "
        "shorten training.", *values
    )  # fmt: skip


def _shapes(records: Dataset) -> Callable[[int], bool]:
    """Return a function that checks whether the image with a given index is wider than tall.

    Detectron2 groups images by this criterion.
    """

    @functools.cache
    def is_wide(index: int) -> bool:
        record = records[index]
        if not {"width", "height"} <= record.keys():
            # Detectron2's records for semantic segmentation contain no image sizes.
            with contextlib.suppress(Exception), Image.open(record["file_name"]) as image:
                return image.width > image.height
            raise UserError(
                f"The size of {record.get('file_name', 'an image')} is unknown, but is required by "
                'DATALOADER.ASPECT_RATIO_GROUPING: the dataset dict does not contain both "width" '
                'and "height", and the image file can\'t be read. Add both keys to all dataset '
                "dicts, or set DATALOADER.ASPECT_RATIO_GROUPING to False."
            )
        return record["width"] > record["height"]

    return is_wide


class PlannedBatches(Sampler[list[SampledIndex]]):
    """Batch sampler that groups images by aspect ratio without reading them.

    As in Detectron2's `AspectRatioGroupedDataset`, images that are wider than tall and all other
    images form two groups, and a batch is yielded as soon as a group contains enough images.
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
            sampler: Sampler that yields an infinite sequence of image indices. Every iterator over
                the sampler must yield the same sequence.
            batch_size: Number of images per batch in this process.
            is_wide: Function that checks whether the image with a given index is wider than tall;
                None disables grouping by aspect ratio.
            start_iter: Index of the first batch to yield.
        """
        self.sampler, self.batch_size, self.is_wide = sampler, batch_size, is_wide
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[SampledIndex]]:
        return islice(self._all(), self.start_iter, None)

    def _all(self) -> Iterator[list[SampledIndex]]:
        waiting: dict[bool, list[SampledIndex]] = {False: [], True: []}
        for sampled in enumerate(self.sampler):
            kind = waiting[bool(self.is_wide and self.is_wide(sampled[1]))]
            kind.append(sampled)
            if len(kind) == self.batch_size:
                yield kind.copy()
                kind.clear()


class _SeededImages(Dataset):
    """Dataset wrapper that seeds the random generators before it loads an image.

    The seed is derived from the run's seed, the rank and the position in the sequence of sampled
    images. Unreadable images are counted and replaced with the next readable image of the dataset.
    """

    def __init__(self, images: Dataset, seed: int, rank: int, skips: SkipCounter):
        self.images, self.seed, self.rank, self.skips = images, seed, rank, skips
        self.warned: set[int] = set()  # indices of the images that this process has warned about

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sampled: SampledIndex) -> Any:
        position, index = sampled
        worker = get_worker_info()
        counter = worker.id if worker else 0
        with seeded_rng(self.seed, self.rank, position, _IMAGES):
            item = self.images[index]
            broken = 0
            while isinstance(item, UnreadableImageError):
                broken += 1
                self.skips.count(counter, 1, 1)
                try:
                    self.skips.check(str(item), _DATA_CHECK)
                except UserError as error:
                    # If the tolerated ratio is 0, every unreadable image is an error.
                    return error if self.skips.max_ratio else item
                if broken == len(self.images):
                    return item
                if index not in self.warned:
                    self.warned.add(index)
                    logger.warning("Skipping an image: %s", item)
                item = self.images[(index + broken) % len(self.images)]
            self.skips.count(counter, 0, 1)
            return item
