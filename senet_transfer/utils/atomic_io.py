"""Files that appear under their name complete and on the disk, or not at all."""

import json
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


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically, the same bytes for the same value."""
    with atomic_file(path) as stream:
        stream.write(json.dumps(value, sort_keys=True, indent=1).encode() + b"\n")
