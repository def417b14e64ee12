"""Run `pip install`, write the output of pip to a log file, and print the progress.

    python tools/pip_progress.py --log LOG --constraints constraints.txt -- --editable .

`make setup` runs this script before anything is installed, so the script uses only the standard
library. On a terminal, one line is updated in place. Otherwise, one line is printed at the start of
each step.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

SHOWN_LINES = 15  # last lines of the log to show after a failure

# Lines in pip's output: a requirement, and the download of a package with its size.
FOUND = re.compile(r"Collecting ([^\s=<>~!;\[(]+)")
FETCHED = re.compile(r"(?:Downloading|Using cached) ([^\s-]+)-([^\s-]+)-\S+\.whl \((.+)\)")
INSTALLING = "Installing collected packages: "
INSTALLED = "Successfully installed "


class Progress:
    """Progress of pip, determined from its output.

    Attributes:
        step: The current step: "Resolving", "Downloading" or "Installing".
        installed: Number of packages that pip has installed.
    """

    def __init__(self, expected: int):
        """
        Args:
            expected: Approximate number of packages.
        """
        self.step, self.installed = "Resolving", 0
        self._expected = expected
        self._numbers: Counter[str] = Counter()
        self._detail = ""

    def read(self, line: str) -> None:
        """Update the progress with a line of pip's output."""
        line = line.strip()
        if match := FOUND.match(line):
            self._next("Resolving", match[1])
        elif match := FETCHED.match(line):
            name, version, size = match.groups()
            self._next("Downloading", f"{name} {version}, {size}")
        elif line.startswith(INSTALLING):
            self.step = "Installing"
            self._expected = line.removeprefix(INSTALLING).count(",") + 1
        elif line.startswith(INSTALLED):
            self.installed = len(line.removeprefix(INSTALLED).split())

    def _next(self, step: str, detail: str) -> None:
        self.step, self._detail = step, detail
        # The expected number excludes versions that pip finds or downloads but then rejects.
        self._numbers[step] = min(self._numbers[step] + 1, self._expected)

    @property
    def heading(self) -> str:
        """The current step and the number of packages, such as "Installing 80 packages"."""
        about = "" if self.step == "Installing" else "about "
        return f"{self.step} {about}{self._expected} packages"

    @property
    def details(self) -> str:
        """The current step, and the number and name of the current package."""
        number = self._numbers[self.step]
        if not number:
            return self.heading
        return f"{self.step} package {number} of about {self._expected}: {self._detail}"


def lines_of(stream: Iterable[str]) -> Iterator[str | None]:
    """Yield the lines of a stream, and None after each second without a line."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def run(command: list[str], log: Path, expected: int, out: IO[str]) -> int:
    """Run a `pip install` command and return its exit status.

    Args:
        command: The `pip install` command.
        log: File for the output of pip.
        expected: Approximate number of packages.
        out: Stream for the progress.
    """
    start = time.monotonic()
    progress, last = Progress(expected), deque[str](maxlen=SHOWN_LINES)
    is_terminal = out.isatty()
    shown: set[str] = set()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as pip,
    ):
        file.write(f"{' '.join(command)}\n")
        for line in lines_of(pip.stdout or ()):
            if line is not None:
                file.write(line)
                file.flush()
                last.append(line)
                progress.read(line)
            if is_terminal:
                text = f"{progress.details} ({time.monotonic() - start:.0f} s)"
                columns = shutil.get_terminal_size().columns
                out.write(f"\r\033[K{text[: columns - 1]}")
                out.flush()
            elif progress.step not in shown:
                shown.add(progress.step)
                print(f"{progress.heading} ...", file=out, flush=True)
    if is_terminal:
        out.write("\r\033[K")
    seconds = time.monotonic() - start
    if pip.returncode == 0:
        done = f"Installed {progress.installed} packages"
        print(f"{done if progress.installed else 'No new packages'} in {seconds:.0f} s", file=out)
        return 0
    print("".join(last).rstrip(), file=sys.stderr)
    print(f"pip failed with status {pip.returncode}. Full output: {log}", file=sys.stderr)
    return pip.returncode


def pins(constraints: Path) -> int:
    """Return the number of packages in a constraints file."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    return sum(bool(line.strip()) and not line.startswith("#") for line in lines)


def main(argv: list[str] | None = None, pip: tuple[str, ...] = ("-m", "pip", "install")) -> int:
    parser = argparse.ArgumentParser(description="Run `pip install` and print its progress.")
    parser.add_argument("--log", type=Path, required=True, help="file for pip's output")
    parser.add_argument(
        "--constraints", type=Path, required=True, help="file with the package versions to install"
    )
    parser.add_argument("arguments", nargs="+", help="arguments for `pip install`, after --")
    args = parser.parse_args(argv)
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    command = [sys.executable, *pip, "--progress-bar", "off", "--constraint", str(args.constraints)]
    return run([*command, *args.arguments], args.log, pins(args.constraints), sys.stdout)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
