"""What a run does when it is told to stop: it finishes the step, saves, and says so by its status.

Schedulers warn a job by SIGTERM before they take its machine, users press Ctrl-C. What a handler
may do in the middle of a step is little, and saving is not among it; so the signal is taken note
of by a thread of its own, which is not held up by a step, and the train loop asks.
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

# Ctrl-C reaches a process from the terminal and from torchrun, which passes it on: one request.
_SAME_REQUEST = 1.0  # seconds

_requested = threading.Event()


def requested() -> bool:
    """Whether this process was told to stop."""
    return _requested.is_set()


@contextlib.contextmanager
def stop_at_step_end() -> Iterator[None]:
    """Within, SIGTERM and SIGINT are requests that the train loop obeys; a second one ends at once.

    Has to be called in the main thread.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _requested.clear()
    threading.Thread(target=_watch, args=(reader, os.getpid()), daemon=True).start()
    # Python's own handler comes when the main thread is back from its library calls; the number of
    # the signal is in the socket at once.
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
        # Every signal that has a handler comes by here, such as that of a child's end.
        while number := reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            name, now = signal.Signals(number[0]).name, time.monotonic()
            if first is None:
                first = now
                _requested.set()
                message = "finishing this step, saving and stopping; once more stops at once"
                print(f"{name} in process {process}: {message}.", file=sys.stderr, flush=True)
            elif now - first > _SAME_REQUEST:
                os._exit(128 + number[0])


@contextlib.contextmanager
def passed_to_children() -> Iterator[None]:
    """Within, the processes that this one has started get the signals that it gets."""

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
