"""Worker processes of data loaders: how they start, and how their errors reach the main process.

torch raises what a worker raised with the worker's traceback in the message. A UserError is meant
for users, so it is returned by the worker as a value, and raised in the main process.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

from senet_transfer.errors import UserError


class ErrorsAsValues:
    """A function that returns the UserError that another one raises.

    Args:
        function: takes one argument.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:
            return error


class RaisingLoader:
    """A data loader that raises a UserError that is in a batch, or in a batch's place.

    Args:
        loader: yields batches; those that are lists are searched.
    """

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            for item in batch if isinstance(batch, list) else [batch]:
                if isinstance(item, UserError):
                    raise item
            yield batch


def init_worker(_worker: int) -> None:
    """Gives the worker one thread, and makes it go on until the process that it works for ends it.

    A signal to stop goes to all processes of a job; the main one saves, and needs its workers for
    the step that it is in. Ignoring SIGTERM would be too much: with the same one, it ends them.
    """
    torch.set_num_threads(1)
    # Inherited: what arrives here is none of the main process's business.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
