"""Start-up and error handling of the worker processes of data loaders.

PyTorch re-raises a worker's exception with the worker's traceback in its message. The message of a
UserError is meant for users, so a worker returns the error as a value and the main process raises
it unchanged.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

from senet_transfer.errors import UserError


class ErrorsAsValues:
    """Wrapper of a function that returns a UserError instead of raising it.

    Args:
        function: The function to wrap; it takes one argument.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:
            return error


class RaisingLoader:
    """Wrapper of a data loader that raises the errors which workers return as values.

    Args:
        loader: Yields batches. A UserError may be a whole batch, or an item of a batch that is a
            list.
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
    """Limit the worker to one thread and let only the main process terminate it.

    Schedulers send SIGINT or SIGTERM to all processes of a job. The main process needs its workers
    to finish the current step before it saves a checkpoint. SIGTERM can't be ignored, because the
    main process sends it to terminate the workers; so the worker checks which process sent it.
    """
    torch.set_num_threads(1)
    # The file descriptor is inherited; signals of a worker must not wake up the main process.
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
