"""Data loaders for data sets in memory: infinite for training, one pass for evaluation.

Training iterates over a sequence of random permutations of the data. Each iteration takes the next
``world_size * batch_size`` images for all processes together; a batch may span two permutations.
The order depends only on the seed, so a run can be resumed at any iteration, and with another
number of processes if the total batch size is the same, and gets the same images as an
uninterrupted run.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from senet_transfer.data.cifar.in_memory import ImageArrays
from senet_transfer.data.cifar.transforms import CifarAugment
from senet_transfer.errors import UserError

# Makes the random numbers of the order independent of those of the augmentation.
_STREAM = 0


class CifarTrainLoader:
    """Infinite iterator over augmented training batches.

    A batch is ``{"image": uint8 (N, 3, 32, 32) RGB, "label": int64 (N,)}`` on the loader's device.
    With Cutout, it also has ``"cutout"``, the centres of the squares, int64 ``(N, 2)``. The model
    passes them to :func:`~senet_transfer.layers.cutout.cut_out` after normalisation.
    """

    def __init__(
        self,
        data: ImageArrays,
        *,
        batch_size: int,
        seed: int,
        augment: CifarAugment | None = None,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        """
        Args:
            data: The training data.
            batch_size: Number of images per iteration in this process.
            seed: Seed of the order and the augmentation, 0 or more.
            augment: The augmentation; None for none.
            start_iter: The first iteration to deliver.
            rank: Rank of this process.
            world_size: Number of processes.
            device: Device on which the data is kept (150 MB for CIFAR) and augmented.

        Raises:
            UserError: If an argument is out of range.
        """
        _check_share(batch_size, rank, world_size)
        if seed < 0 or start_iter < 0:
            raise UserError(f"seed is {seed} and start_iter is {start_iter}; expected 0 or more.")
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.start_iter, self.rank, self.world_size = start_iter, rank, world_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        raise TypeError("the training loader is infinite and has no length")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        iteration = self.start_iter
        while True:
            yield self.batch(iteration)
            iteration += 1

    def indices(self, iteration: int) -> np.ndarray:
        """Return the image indices of an iteration, for all processes.

        The result has shape `(world_size * batch_size,)`.
        """
        total = self.batch_size * self.world_size
        places = np.arange(iteration * total, (iteration + 1) * total)
        epochs, places = np.divmod(places, len(self.labels))
        parts = [self._permutation(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, int(epoch), _STREAM))
            self._epoch, self._order = epoch, rng.permutation(len(self.labels))
        return self._order

    def batch(self, iteration: int) -> dict[str, Tensor]:
        """Return the batch of this process in an iteration."""
        rows = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        index = torch.from_numpy(self.indices(iteration)[rows]).to(self.labels.device)
        batch = {"image": self.images[index], "label": self.labels[index]}
        if self.augment is not None:
            draws = self.augment.draw(
                self.batch_size * self.world_size,
                seed=self.seed,
                iteration=iteration,
                side=self.images.shape[-1],
            ).part(self.rank, self.batch_size)
            batch["image"] = self.augment.move(batch["image"], draws)
            if self.augment.cutout:
                batch["cutout"] = draws.centre.to(self.labels.device)
        return batch


class CifarEvalLoader:
    """Iterator over this process's share of the data, once, in order and without augmentation.

    A batch has ``"image"`` and ``"label"`` as in training, ``"key"``, a name for each image, and
    ``"index"``, the images' indices in the data set.

    Attributes:
        expected: Number of images for this process.
    """

    def __init__(
        self,
        data: ImageArrays,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        """
        Args:
            data: The data to evaluate on.
            batch_size: Number of images per batch; the last batch may be smaller.
            rank: Rank of this process.
            world_size: Number of processes.
            device: Device of the batches.

        Raises:
            UserError: If an argument is out of range.
        """
        _check_share(batch_size, rank, world_size)
        start, end = (len(data) * part // world_size for part in (rank, rank + 1))
        self.images, self.labels = data.images[start:end], data.labels[start:end]
        self.start, self.batch_size, self.device = start, batch_size, device
        self.expected = end - start

    def __len__(self) -> int:
        return -(-self.expected // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.expected, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.expected))
            places = list(range(self.start + rows.start, self.start + rows.stop))
            yield {
                "image": self.images[rows].to(self.device),
                "label": self.labels[rows].to(self.device),
                "key": [str(place) for place in places],
                "index": places,
            }


def _check_share(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or not 0 <= rank < world_size:
        raise UserError(
            f"The batch size is {batch_size} and the rank is {rank} of {world_size}; expected a "
            "batch size of at least 1 and a rank from 0 to the number of processes minus 1."
        )
