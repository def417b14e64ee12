"""Work on many files in several processes."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from senet_transfer.errors import UserError


def run_parallel(
    function: Callable[..., Any], tasks: Sequence[Any], argument: Any, workers: int
) -> Iterator[tuple[Any, Any]]:
    """Calls `function(task, argument)` for each task, and yields task and result as they are done.

    Args:
        function: of a module, so that it can be sent to a process.
        tasks: sent to the processes one at a time; all of them at once could fill the memory.
        argument: passed with each.
        workers: processes.

    Raises:
        UserError: a process was killed, or what the function raises.
    """
    remaining = iter(tasks)
    waiting: dict[Future, Any] = {}
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        # The start of a fresh interpreter takes seconds; no thread is running yet to forbid it.
        mp_context=multiprocessing.get_context("fork"),
        initializer=_end_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        while True:
            while len(waiting) < 2 * workers and (task := next(remaining, None)) is not None:
                waiting[pool.submit(function, task, argument)] = task
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for want of memory. Use fewer workers; "
            "what is complete is kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent is gone: killed with -9, it cannot tell its children."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
