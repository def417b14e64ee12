"""Progress of what takes longer than a few seconds: one kind of bar, everywhere."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_QUIET = ContextVar("quiet", default=False)


def progress(items: Iterable[Any] | None = None, *, quiet: bool = False, **options: Any) -> tqdm:
    """A bar on stderr, and none where stderr is no terminal.

    Args:
        items: to go through; None for a bar that is told of progress by its ``update``.
        quiet: no bar on a terminal, either.
        options: tqdm's own, such as ``total``, ``unit`` and ``desc``.
    """
    # None is tqdm's word for "unless it is a terminal".
    return tqdm(items, disable=True if quiet or _QUIET.get() else None, **options)


@contextmanager
def no_bars(quiet: bool = True) -> Iterator[None]:
    """Within it there is no bar, however deep what would show it lies; with False it does nothing.

    For commands. What takes long and is called directly has an argument ``quiet`` of its own.
    """
    token = _QUIET.set(quiet or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(token)
