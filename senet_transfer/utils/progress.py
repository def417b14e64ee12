"""Progress bars for operations that take longer than a few seconds."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_QUIET = ContextVar("quiet", default=False)


def progress(items: Iterable[Any] | None = None, *, quiet: bool = False, **options: Any) -> tqdm:
    """Return a progress bar on stderr, which is shown only if stderr is a terminal.

    Args:
        items: the items to iterate over; None for a bar that is advanced by its ``update`` method.
        quiet: whether to hide the bar on a terminal too.
        options: further arguments of tqdm, such as ``total``, ``unit`` and ``desc``.
    """
    # With disable=None, tqdm shows the bar only on a terminal.
    return tqdm(items, disable=True if quiet or _QUIET.get() else None, **options)


@contextmanager
def no_bars(quiet: bool = True) -> Iterator[None]:
    """Hide all progress bars that are created within the block.

    Commands use this context. Long-running functions also have an argument ``quiet``.

    Args:
        quiet: False leaves the bars as they are.
    """
    token = _QUIET.set(quiet or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(token)
