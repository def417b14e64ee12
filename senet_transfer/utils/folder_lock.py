"""Lock of a folder against other processes that write to it."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from senet_transfer.errors import UserError

LOCK = ".lock"

_ATTEMPTS, _PAUSE = 20, 0.25  # The pause is in seconds.


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[TextIO]:
    """Hold an exclusive lock on an existing folder inside the context.

    Yields:
        The open lock file. A child process that inherits its file descriptor also holds the lock,
        so that the folder remains locked if this process is killed and the child is not.

    Raises:
        UserError: If another process has locked the folder.
    """
    with open(folder / LOCK, "w") as lock:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # The workers of a run that was just killed may hold the lock for a moment.
                if attempt == _ATTEMPTS - 1:
                    raise UserError(
                        f"Another run is writing to {folder}. Wait until it finishes, or stop it."
                    ) from None
                time.sleep(_PAUSE)
        yield lock
