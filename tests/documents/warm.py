"""Process that imports the package once, and then forks itself for each Python script.

Importing torch and Detectron2 takes four seconds, but most documented commands take only one second
after that. The worker processes of `--num-gpus 2` are forked, too. test_startup.py and
tests/faults/test_jobs.py test processes that are not forked.
"""

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

LIMIT = 300  # time limit of a command in seconds


class WarmPython:
    """Context manager for a process that runs scripts one after another in forked processes.

    Args:
        folder: Working directory of the scripts.
        environment: Environment variables of the scripts.
        printed: Path prefix of two temporary files that capture a script's stdout (extension
            ``.out``) and stderr (``.err``). Default: ``folder``.
    """

    def __init__(self, folder: Path, environment: dict[str, str], printed: Path | None = None):
        self.folder = folder
        self.printed = printed or folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.documents.warm"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment,
        )  # fmt: skip

    def __enter__(self) -> "WarmPython":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def call(self, words: list[str]) -> subprocess.CompletedProcess:
        """Run Python with arguments that start with a script, ``-c CODE`` or ``-m MODULE``."""
        printed = [self.printed.with_name(f"{self.printed.name}.{name}") for name in ("out", "err")]
        request = {"words": words, "printed": [str(path) for path in printed]}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(words, status, *(path.read_text() for path in printed))


def _become(words: list[str], printed: list[str]) -> None:
    """Run a Python command line in this process, with a time limit of ``LIMIT`` seconds."""
    signal.alarm(LIMIT)
    for descriptor, path in enumerate([os.devnull, *printed]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    if words[0] == "-c":
        sys.argv[:], sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
        return
    if words[0] == "-m":
        sys.argv[:], sys.path[0] = words[1:], ""
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:], sys.path[0] = words, os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    """Run the commands read from stdin, one JSON object per line, and print each exit status."""
    import torch.multiprocessing as mp

    import senet_transfer.analysis.report
    import senet_transfer.engine.inference.evaluate
    import senet_transfer.engine.train  # noqa: F401

    mp.start_processes = functools.partial(mp.start_processes, start_method="fork")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
