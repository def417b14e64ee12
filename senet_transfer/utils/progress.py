"""Progress bars for operations that take longer than a few seconds."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_QUIET = ContextVar("quiet", default=False)


def progress(items: Iterable[Any] | None = None, *, quiet: bool = False, **options: Any) -> tqdm:
    """Return a progress bar, which is shown on stderr if stderr is a terminal.

    Args:
        items: Items to iterate over. If None, the caller advances the bar with its ``update``
            method.
        quiet: Whether to hide the bar even if stderr is a terminal.
        options: Further tqdm arguments, such as ``total``, ``unit`` and ``desc``.
    """
    # With disable=None, tqdm shows the bar only on a terminal.
    return tqdm(items, disable=True if quiet or _QUIET.get() else None, **options)


@contextmanager
def no_bars(quiet: bool = True) -> Iterator[None]:
    """Hide all progress bars created within the block.

    Args:
        quiet: Whether to hide the bars. If False, the context manager has no effect.
    """
    token = _QUIET.set(quiet or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(token)
