"""Cache for files that a command reads several times."""

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
    """Cache the results of :func:`once_per_file` functions until the end of the block.

    For example, a run verifies a weight file, infers the network's architecture from it and loads
    it into the model. Within the block, only the first of these steps reads the file. The cache is
    cleared when the block ends, which frees the memory of the cached tensors.
    """
    token = _RESULTS.set({})
    try:
        yield
    finally:
        _RESULTS.reset(token)


def once_per_file(
    function: Callable[Concatenate[str | Path, _Rest], _Result],
) -> Callable[Concatenate[str | Path, _Rest], _Result]:
    """Decorate a file-reading function so that its results are cached within :func:`read_once`.

    Results are cached per file and arguments. A file that has been replaced or modified is read
    again. Outside :func:`read_once`, results are not cached.
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
