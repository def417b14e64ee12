"""Tests for graceful shutdown, and for forwarding signals to child processes."""

import os
import signal
import time

import pytest

from senet_transfer.engine.signals import requested, stop_at_step_end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_a_stop_and_its_handler_is_restored(number):
    before = signal.getsignal(number)
    with stop_at_step_end():
        assert not requested()
        os.kill(os.getpid(), number)
        # After Ctrl-C, both the terminal and torchrun send a signal; they count as one request.
        os.kill(os.getpid(), number)
        until = time.monotonic() + 5
        while not requested() and time.monotonic() < until:
            time.sleep(0.01)
        assert requested()
    assert signal.getsignal(number) is before
    assert not requested()


@pytest.mark.long
def test_a_process_that_waits_for_others_forwards_signals(run_python):
    code = """
import multiprocessing, os, signal, sys, threading, time
from senet_transfer.engine.signals import passed_to_children
def child():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    time.sleep(20)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
time.sleep(0.3)
with passed_to_children():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    process.join(10)
sys.exit(process.exitcode)
"""
    done = run_python("-c", code)
    assert done.returncode == 75, done.stderr
