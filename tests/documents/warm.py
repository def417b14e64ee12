"""Runs Python scripts in forks of a process that has imported what all of them do.

Most commands of the documents take a second, after four in which they import torch and Detectron2.
Here these are paid once. What starts cold is tested by test_startup.py and test_commands.py.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

LIMIT = 300  # seconds that a command may take


class WarmPython:
    """A process that runs one script after the other; a context manager.

    Args:
        folder: of the scripts and of what they write.
        environment: of the process.
        printed: where the output of a script is kept until it is returned; None is next to
            ``folder``.
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
        """Run ``python WORDS``, where the words are a script's or ``-c CODE`` and its arguments."""
        printed = [self.printed.with_name(f"{self.printed.name}.{name}") for name in ("out", "err")]
        request = {"words": words, "printed": [str(path) for path in printed]}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(words, status, *(path.read_text() for path in printed))


def _become(words: list[str], printed: list[str]) -> None:
    """Goes on as ``python WORDS`` would, and is ended where it hangs."""
    signal.alarm(LIMIT)
    for descriptor, path in enumerate([os.devnull, *printed]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    if words[0] == "-c":
        sys.argv[:], sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
        return
    sys.argv[:], sys.path[0] = words, os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    """Answers each line with the status of the script that it asks for."""
    import senet_transfer.analysis.report
    import senet_transfer.cli.evaluate
    import senet_transfer.engine.train  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
