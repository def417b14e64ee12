"""Counting the samples that cannot be decoded."""

import torch

from senet_transfer.errors import UserError

# A ratio means little over few samples: the first broken one of a run is one of one.
RATIO_OVER = 1000


class SkipCounter:
    """Counts samples and broken ones across the workers of a rank, in shared memory."""

    def __init__(self, workers: int, max_ratio: float):
        """
        Args:
            workers: processes that count; 0 is one.
            max_ratio: broken samples, 0-1 of those seen (of 1000 where fewer were), beyond which
                going on is an error.

        Raises:
            UserError: a ratio that is none.
        """
        if not 0 <= max_ratio <= 1:
            raise UserError(f"max_skip_ratio={max_ratio}: expected 0 to 1.")
        self.max_ratio = max_ratio
        # A row a worker: no two processes write to the same number.
        self._counts = torch.zeros(max(workers, 1), 2, dtype=torch.int64).share_memory_()

    @property
    def seen(self) -> int:
        """Samples looked at, broken ones among them."""
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> int:
        """Broken samples."""
        return int(self._counts[:, 1].sum())

    def count(self, worker: int, broken: int, total: int) -> None:
        """Adds to a worker's numbers."""
        self._counts[worker, 0] += total
        self._counts[worker, 1] += broken

    def check(self, last: str) -> None:
        """Raises a UserError when too many were broken; `last` describes the last one."""
        if self.skipped > self.max_ratio * max(self.seen, RATIO_OVER):
            raise UserError(
                f"{self.skipped} of {self.seen} images cannot be decoded, tolerated are "
                f"{self.max_ratio:.2%}; the last: {last}. Verify the data "
                "(datasets/prepare_places365.py --verify, or prepare_folder.py --verify)."
            )
