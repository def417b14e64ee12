"""Parallel processing of tasks in worker processes."""

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
        function: Function to call; it must be defined at module level, so that it can be pickled.
        tasks: Tasks to process. At most ``2 * workers`` tasks are submitted at a time, because
            submitting all of them at once could exhaust memory.
        argument: Second argument of every call.
        workers: Number of processes.

    Raises:
        UserError: If a process is killed. Exceptions raised by the function are
            propagated unchanged.
    """
    remaining = iter(tasks)
    waiting: dict[Future, Any] = {}
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)) or 1,
        # Fork, because spawning an interpreter takes seconds. Forking is safe while no threads are
        # running.
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
            "A worker process was killed, most likely because the machine ran out of memory. "
            "Completed files are kept. Repeat the command with fewer workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Exit this process as soon as its parent process has ended, even if the parent was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
