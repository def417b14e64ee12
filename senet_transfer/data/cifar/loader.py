"""Data loaders for in-memory datasets: infinite for training, one pass for evaluation.

Training iterates over a sequence of random permutations of the data. In each iteration, the
processes together take the next ``world_size * batch_size`` images; a batch may span two
permutations. The order depends only on the seed. A run that is resumed at any iteration therefore
gets the same images as an uninterrupted run, even with a different number of processes, as long as
the total batch size is the same.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from senet_transfer.data.cifar.in_memory import ImageArrays
from senet_transfer.data.cifar.transforms import CifarAugment, Draws, to_device
from senet_transfer.errors import UserError

# Random stream for the sample order, independent of the augmentation stream.
_STREAM = 0


class CifarTrainLoader:
    """Infinite iterator over augmented training batches.

    A batch is ``{"image": uint8 (N, 3, 32, 32) RGB, "label": int64 (N,)}`` on the loader's device.
    With Cutout, it also contains ``"cutout"``, the centres of the squares, int64 ``(N, 2)``. The
    model passes them to :func:`~senet_transfer.layers.cutout.cut_out` after normalisation.
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
        planned: bool = False,
    ):
        """
        Args:
            data: Training data.
            batch_size: Number of images per iteration in this process.
            seed: Non-negative random seed of the order and augmentation.
            augment: Augmentation to apply; None to disable it.
            start_iter: Iteration to start from; must be non-negative.
            rank: Rank of this process.
            world_size: Number of processes.
            device: Device on which the data is stored (150 MB for CIFAR) and augmented.
            planned: If True, yield the result of :meth:`plan` for each iteration instead of a
                batch. :meth:`assemble` then builds the batch on the device, for example inside a
                CUDA graph.

        Raises:
            UserError: If an argument is out of range.
        """
        _check_share(batch_size, rank, world_size)
        if seed < 0 or start_iter < 0:
            raise UserError(
                f"seed is {seed} and start_iter is {start_iter}; expected non-negative integers."
            )
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.start_iter, self.rank, self.world_size = start_iter, rank, world_size
        self.planned = planned
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        raise TypeError("The training loader is infinite and has no length")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        iteration = self.start_iter
        while True:
            yield self.plan(iteration) if self.planned else self.batch(iteration)
            iteration += 1

    def indices(self, iteration: int) -> np.ndarray:
        """Return the image indices of all processes for an iteration.

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
        """Return this process's batch for an iteration."""
        device = self.labels.device
        plan = self.plan(iteration)
        return self.assemble({key: to_device(value, device) for key, value in plan.items()})

    def plan(self, iteration: int) -> dict[str, Tensor]:
        """Return the image indices and augmentation parameters for this process's batch.

        Returns:
            A dictionary of CPU tensors. ``"index"`` contains the image indices, int64 ``(N,)``.
            With augmentation, it also contains the attributes of
            :class:`~senet_transfer.data.cifar.transforms.Draws`.
        """
        rows = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        plan = {"index": torch.from_numpy(self.indices(iteration)[rows])}
        if self.augment is None:
            return plan
        draws = self.augment.draw(
            self.batch_size * self.world_size,
            seed=self.seed,
            iteration=iteration,
            side=self.images.shape[-1],
        )
        return plan | vars(draws.part(self.rank, self.batch_size))

    def assemble(self, plan: dict[str, Tensor]) -> dict[str, Tensor]:
        """Build a batch from the result of :meth:`plan`, which must be on the loader's device."""
        index = plan["index"]
        batch = {"image": self.images[index], "label": self.labels[index]}
        if self.augment is not None:
            draws = Draws(**{key: value for key, value in plan.items() if key != "index"})
            batch["image"] = self.augment.move(batch["image"], draws)
            if self.augment.cutout:
                batch["cutout"] = draws.centre
        return batch


class CifarEvalLoader:
    """One-pass iterator over this process's share of the data, in order and without augmentation.

    A batch contains ``"image"`` and ``"label"`` as in training. In addition, ``"index"`` contains
    the image indices in the dataset, ``"key"`` the same indices as strings, and ``"path"`` the
    image paths.

    Attributes:
        expected: Number of images that this process loads.
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
            data: Evaluation data.
            batch_size: Number of images per batch; the last batch may be smaller.
            rank: Rank of this process.
            world_size: Number of processes.
            device: Device for the batches.

        Raises:
            UserError: If an argument is out of range.
        """
        _check_share(batch_size, rank, world_size)
        start, end = (len(data) * part // world_size for part in (rank, rank + 1))
        self.images, self.labels = data.images[start:end], data.labels[start:end]
        self.start, self.batch_size, self.device = start, batch_size, device
        self.expected = end - start
        self.path = data.path

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
                "path": list(map(self.path, places)),
            }


def _check_share(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or not 0 <= rank < world_size:
        raise UserError(
            f"The batch size is {batch_size}, the rank is {rank} and the world size is "
            f"{world_size}; expected a batch size of at least 1 and a rank from 0 to the world "
            "size minus 1."
        )
