"""Initialisation and error handling for data loader workers.

PyTorch adds the worker's traceback to the message of an exception that it re-raises. UserError
messages are meant for users, so workers return UserErrors as values, and the main process raises
them unchanged.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

from senet_transfer.errors import UserError


class ErrorsAsValues:
    """Function wrapper that returns a UserError instead of raising it.

    Args:
        function: Function of one argument to wrap.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:
            return error


class RaisingLoader:
    """Data loader wrapper that raises the UserErrors that workers return as values.

    Args:
        loader: Data loader to wrap. If a batch is a list, each item may be a UserError; otherwise,
            the batch itself may be one.
    """

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return len(self.loader)

    @property
    def dataset(self) -> Any:
        """Return the dataset of the wrapped PyTorch data loader."""
        return self.loader.dataset  # type: ignore[attr-defined]  # an iterable may have none

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            for item in batch if isinstance(batch, list) else [batch]:
                if isinstance(item, UserError):
                    raise item
            yield batch


def init_worker(_worker: int) -> None:
    """Limit a worker to one thread, and allow only the main process to terminate the worker.

    Job schedulers send SIGINT or SIGTERM to all processes of a job, but the main process needs its
    workers until it has finished the current step and saved a checkpoint. Workers cannot ignore
    SIGTERM, because the main process also uses this signal to stop them. They therefore check which
    process sent the signal.
    """
    torch.set_num_threads(1)
    # Workers inherit the wakeup file descriptor, but their signals must not wake the main process.
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
