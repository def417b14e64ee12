"""Atomic file writing: a file appears under its final name only when it is complete and on disk."""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

# Matches a list of numbers in the indented output of json.dumps. Its line breaks distinguish it
# from a string with the same characters.
_NUMBER_LIST = re.compile(r"\[\n\s*(?:[-+.\deE]+|null)(?:,\n\s*(?:[-+.\deE]+|null))*\n\s*\]")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that atomically replaces ``path`` when the block ends.

    If the block raises an exception, the temporary file is deleted and any existing file at
    ``path`` is left unchanged. The parent folder must exist.

    Raises:
        OSError: If the file can't be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        # Sync the content before renaming. Otherwise, a crash could leave an incomplete file under
        # the final name.
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp and safetensors create files that only their owner can read.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        # Report the first error, even if deleting the temporary file fails too.
        with suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for atomic writing in binary mode; see :func:`atomic_path`."""
    with atomic_path(path) as partial, open(partial, "wb") as stream:
        yield stream


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk with ``fsync``, so that file renames in it survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(
    path: str | Path, value: Any, *, indent: int | None = 2, sort_keys: bool = False
) -> None:
    """Write a value as JSON atomically. NaN and infinity, which JSON can't represent, become null.

    Args:
        path: Path of the file.
        value: JSON-serialisable value, made of numbers, strings, lists and dicts.
        indent: Number of spaces per level; None writes a single line. Lists of numbers are always
            written on one line.
        sort_keys: Whether to sort dict keys, so that equal values produce identical bytes.

    Raises:
        OSError: If the file can't be written.
    """
    text = json.dumps(nonfinite_to_null(value), indent=indent, sort_keys=sort_keys, allow_nan=False)
    if indent is not None:
        text = _NUMBER_LIST.sub(lambda match: re.sub(r"\s+", " ", match[0])[2:-2].join("[]"), text)
    with atomic_file(Path(path)) as stream:
        stream.write(text.encode() + b"\n")


def nonfinite_to_null(value: Any) -> Any:
    """Return a copy of a JSON value with every NaN and infinity replaced by None."""
    if isinstance(value, dict):
        return {key: nonfinite_to_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
