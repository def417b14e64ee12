"""Files that appear under their name complete and on the disk, or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` to write to, which takes its name when all went well.

    What had the name before is replaced, or where something fails is as it was. The file's folder
    has to exist.

    Raises:
        OSError: it can't be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        # On the disk before it has its name, or a crash could leave the name without the content.
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp and safetensors make files for their owner only.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        # What failed first is what is told.
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
    """Opens a file for writing, as :func:`whole_file` makes it."""
    with whole_file(path) as partial, open(partial, "wb") as stream:
        yield stream


def _sync_folder(folder: Path) -> None:
    """Makes the names of a folder's files as durable as their content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(
    path: str | Path, value: Any, *, indent: int | None = 2, sort_keys: bool = False
) -> None:
    """Write a value as JSON, atomically. NaN and infinity, which JSON lacks, become null.

    Args:
        path: the file.
        value: numbers, text, lists and dicts of these.
        indent: spaces per level; None for a single line, for large values.
        sort_keys: whether equal dicts give the same bytes whatever the order of their keys.

    Raises:
        OSError: the file can't be written.
    """
    text = json.dumps(nonfinite_to_null(value), indent=indent, sort_keys=sort_keys, allow_nan=False)
    with atomic_file(Path(path)) as stream:
        stream.write(text.encode() + b"\n")


def nonfinite_to_null(value: Any) -> Any:
    """Return a value for JSON, with None in place of every NaN and infinity."""
    if isinstance(value, dict):
        return {key: nonfinite_to_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
