"""Graceful shutdown on SIGTERM and Ctrl-C: finish the step, save a checkpoint, exit with status 75.

Schedulers send SIGTERM to a job before they reclaim its machine, and users press Ctrl-C. Because a
signal handler can't save a checkpoint in the middle of a step, a separate thread receives the
signal, even during a long step, and the training loop checks for it after each step.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import active_children
from types import FrameType

# EX_TEMPFAIL of sysexits.h: try again later.
STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)

# On Ctrl-C, a process receives SIGINT from the terminal and again from torchrun. Signals that
# arrive within this time count as one request.
_SAME_REQUEST = 1.0  # seconds

_requested = threading.Event()


def requested() -> bool:
    """Return whether this process has received a request to stop."""
    return _requested.is_set()


@contextlib.contextmanager
def stop_at_step_end() -> Iterator[None]:
    """Treat SIGTERM and SIGINT as requests to stop after the current step.

    A second signal ends the process immediately. This context manager must be entered in the main
    thread.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _requested.clear()
    threading.Thread(target=_watch, args=(reader, os.getpid()), daemon=True).start()
    # A Python signal handler runs only after the main thread has returned from library code,
    # whereas the signal number is written to the socket immediately.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        _requested.clear()


def _watch(reader: socket.socket, process: int) -> None:
    first = None
    with reader:
        # All signals with a Python handler arrive here, including others such as SIGCHLD.
        while number := reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            name, now = signal.Signals(number[0]).name, time.monotonic()
            if first is None:
                first = now
                _requested.set()
                message = "saving a checkpoint after this step. Send it again to stop immediately"
                print(
                    f"Received {name} in process {process}: {message}.", file=sys.stderr, flush=True
                )
            elif now - first > _SAME_REQUEST:
                os._exit(128 + number[0])


@contextlib.contextmanager
def passed_to_children() -> Iterator[None]:
    """Forward SIGTERM and SIGINT to the child processes while the context is active."""

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in active_children():
            if child.pid is not None:
                with contextlib.suppress(OSError):
                    os.kill(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
