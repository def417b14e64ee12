"""JSON files with the results of commands."""

from pathlib import Path
from typing import Any

from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import write_json


def write_results(path: str | Path, results: Any, *, indent: int | None = 2) -> None:
    """Write results as JSON with :func:`~senet_transfer.utils.atomic_io.write_json`.

    The write is atomic because the existence of the file marks a run as finished.

    Raises:
        UserError: If the file can't be written.
    """
    try:
        write_json(path, results, indent=indent)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Choose a different path.") from error


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers in a run's results by name, such as ``classification/top1_error``."""
    return {
        f"{task}/{name}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, int | float)
    }
