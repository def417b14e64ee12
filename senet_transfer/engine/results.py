"""What a command found, as files that any program can read."""

import json
import math
from pathlib import Path
from typing import Any

from senet_transfer.engine.checkpoints.checkpoint_history import write_text
from senet_transfer.errors import UserError


def write_results(path: str | Path, results: Any, *, indent: int | None = 2) -> None:
    """Writes results as JSON, which has no NaN and no infinity: these become null.

    The file is whole or not there at all: who finds it takes the run for done.

    Args:
        path: the file.
        results: numbers, text, lists and dicts of these.
        indent: spaces a level; None for all in one line, where there may be much of it.

    Raises:
        UserError: the file can't be written.
    """
    try:
        write_text(Path(path), json.dumps(_finite(results), indent=indent, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Take another place.") from error


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run's results by name, such as ``classification/top1_error``."""
    return {
        f"{task}/{name}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
