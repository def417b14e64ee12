"""Helper for running commands in subprocesses."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def call(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the repository root and capture its output as text."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
