"""Progress of what takes longer than a few seconds: one kind of bar, everywhere."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None = None, *, quiet: bool = False, **options: Any) -> tqdm:
    """A bar on stderr, and none where stderr is no terminal.

    Args:
        items: to go through; None for a bar that is told of progress by its ``update``.
        quiet: no bar on a terminal, either.
        options: tqdm's own, such as ``total``, ``unit`` and ``desc``.
    """
    # None is tqdm's word for "unless it is a terminal".
    return tqdm(items, disable=True if quiet else None, **options)
