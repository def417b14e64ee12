"""What every worker process of a data loader begins with."""

import os
import signal
import threading

import torch


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
