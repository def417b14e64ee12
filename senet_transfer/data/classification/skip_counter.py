"""Counter of samples that cannot be decoded."""

import torch

from senet_transfer.errors import UserError

# Minimum denominator of the skip ratio. Otherwise, a broken first sample would give a ratio of 1.
RATIO_OVER = 1000

_VERIFY = (
    "Verify the data with datasets/prepare_places365.py --verify or prepare_folder.py --verify."
)


class SkipCounter:
    """Counter of all samples and of broken samples, in memory shared by a rank's workers."""

    def __init__(self, workers: int, max_ratio: float):
        """
        Args:
            workers: Number of worker processes; 0 to count in the main process.
            max_ratio: Tolerated fraction of broken samples, 0-1. The fraction is relative to the
                number of samples seen, or to 1000 if fewer have been seen.

        Raises:
            UserError: If `max_ratio` is out of range.
        """
        if not 0 <= max_ratio <= 1:
            raise UserError(f"max_skip_ratio={max_ratio}; expected a fraction from 0 to 1.")
        self.max_ratio = max_ratio
        # One row per worker, so that no two processes write to the same element.
        self._counts = torch.zeros(max(workers, 1), 2, dtype=torch.int64).share_memory_()

    @property
    def seen(self) -> int:
        """Number of samples counted so far in all workers, including broken samples."""
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> int:
        """Number of broken samples counted so far in all workers."""
        return int(self._counts[:, 1].sum())

    def count(self, worker: int, broken: int, total: int) -> None:
        """Increase a worker's counts of samples.

        Args:
            worker: Index of the worker.
            broken: Number of broken samples to add.
            total: Number of samples to add, including the broken samples.
        """
        self._counts[worker, 0] += total
        self._counts[worker, 1] += broken

    def check(self, last: str, remedy: str = _VERIFY) -> None:
        """Raise a UserError if too many samples are broken; `last` describes the last one."""
        if self.skipped > self.max_ratio * max(self.seen, RATIO_OVER):
            raise UserError(
                f"{self.skipped} of {self.seen} images cannot be decoded; expected at most "
                f"{self.max_ratio:.2%} (DATALOADER.MAX_SKIP_RATIO). The last one is {last}. "
                f"{remedy}"
            )
