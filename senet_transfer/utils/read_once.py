"""Files that several steps of one task need, read by the first of them only."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")

_RESULTS: ContextVar[dict[Any, Any] | None] = ContextVar("results", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Keep the results of :func:`once_per_file` functions until the end of the block.

    The start of a run verifies a weight file, takes its geometry and fills the model from it;
    inside the block the file is read for the first of these. Nothing is kept after it, so no tensor
    outlives its use.
    """
    token = _RESULTS.set({})
    try:
        yield
    finally:
        _RESULTS.reset(token)


def once_per_file(
    function: Callable[Concatenate[str | Path, _Rest], _Result],
) -> Callable[Concatenate[str | Path, _Rest], _Result]:
    """Make a function of a file run once per file and arguments inside :func:`read_once`.

    A file that is replaced or changed is another file. Outside the block nothing is kept.
    """

    @functools.wraps(function)
    def read(path: str | Path, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        results = _RESULTS.get()
        if results is None or not os.path.exists(path):
            return function(path, *args, **kwargs)
        file = os.stat(path)
        identity = (file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns)
        key = (function, identity, args, tuple(kwargs.items()))
        if key not in results:
            results[key] = function(path, *args, **kwargs)
        return results[key]

    return read
