"""Gate statistics as CSV files and as a printed table."""

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tabulate import tabulate

from senet_transfer.analysis.excitations.collect import Excitations
from senet_transfer.errors import UserError

_ALL = "all classes"


def block_table(found: Excitations) -> str:
    """Format a table with the :class:`~.statistics.Summary` for each block."""
    rows = []
    for name, block in found.blocks.items():
        one = block.summary()
        rows.append(
            (
                name,
                one.channels,
                f"{one.mean:.3f}",
                f"{100 * one.saturated:.1f}%",
                f"{100 * one.closed:.1f}%",
                f"{one.between:.4f}",
                f"{one.within:.4f}",
                f"{one.specificity:.2f}",
                one.verdict,
            )
        )
    headers = (
        "block", "channels", "mean", "> 0.95", "< 0.05", "between", "within", "ratio", ""
    )  # fmt: skip
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 7, "left"))


def write_csv(found: Excitations, folder: str) -> list[str]:
    """Write ``gates.csv`` (one row per channel and class) and ``blocks.csv`` (one row per block).

    Returns:
        The paths of the files.

    Raises:
        UserError: If a file can't be written.
    """
    gates = ("block", "channel", "class", "images", "mean", "std")
    blocks = (
        "block", "channels", "mean", "above_0.95", "below_0.05", "between", "within", "ratio",
        "verdict",
    )  # fmt: skip
    return [
        _write(folder, "gates.csv", gates, _gate_rows(found)),
        _write(folder, "blocks.csv", blocks, _block_rows(found)),
    ]


def _gate_rows(found: Excitations) -> Iterator[tuple]:
    for name, block in found.blocks.items():
        for label, title in found.drawn.items():
            kept = block.kept[label]
            for channel, (mean, std) in enumerate(zip(kept.mean, kept.std, strict=True)):
                yield name, channel, title, kept.images, f"{mean:.6f}", f"{std:.6f}"
        for channel, mean in enumerate(block.mean_of_classes):
            yield name, channel, _ALL, found.images, f"{mean:.6f}", ""


def _block_rows(found: Excitations) -> Iterator[tuple]:
    for name, block in found.blocks.items():
        one = block.summary()
        numbers = (one.mean, one.saturated, one.closed, one.between, one.within, one.specificity)
        yield name, one.channels, *(f"{number:.6f}" for number in numbers), one.verdict


def _write(folder: str, name: str, header: tuple[str, ...], rows: Iterable[tuple]) -> str:
    path = str(Path(folder, name))
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error}. Choose a different --output."
        ) from error
    return path
