"""Lock that prevents several processes from writing to the same folder."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from senet_transfer.errors import UserError

LOCK = ".lock"

_ATTEMPTS, _PAUSE = 20, 0.25  # The pause between attempts is in seconds.


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[TextIO]:
    """Hold an exclusive lock on an existing folder inside the context.

    Yields:
        The open lock file. A child process that inherits its file descriptor also holds the lock,
        so the folder remains locked if only the parent process is killed.

    Raises:
        UserError: If another process has locked the folder.
    """
    with open(folder / LOCK, "w") as lock:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # The worker processes of a run that was just killed may hold the lock a little
                # longer.
                if attempt == _ATTEMPTS - 1:
                    raise UserError(
                        f"Another run is writing to {folder}. Wait until it finishes, or stop it."
                    ) from None
                time.sleep(_PAUSE)
        yield lock
