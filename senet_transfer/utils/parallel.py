"""Parallel processing of many files in several processes."""

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
    """Yield ``(task, function(task, argument))`` for each task, in the order of completion.

    Args:
        function: a module-level function, so that it can be pickled.
        tasks: the tasks. At most twice as many as there are workers are submitted at a time,
            because all of them at once could fill the memory.
        argument: the second argument of every call.
        workers: the number of processes.

    Raises:
        UserError: if a process was killed. Exceptions of the function are raised unchanged.
    """
    remaining = iter(tasks)
    waiting: dict[Future, Any] = {}
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        # Spawning an interpreter takes seconds, and forking is safe while no threads are running.
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
            "a worker process was killed, most likely because the memory ran out. Use fewer "
            "workers; completed files are kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Exit this process when its parent has ended, including when the parent was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
