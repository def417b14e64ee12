"""Figures of SE gate values by channel, as in Figures 6 and 7 of the SENet paper."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from senet_transfer.analysis.excitations.collect import Excitations
from senet_transfer.analysis.excitations.gates import stage_of
from senet_transfer.analysis.excitations.statistics import GateStatistics
from senet_transfer.data.classification.subsets import draw

# A colour-blind safe palette (Okabe and Ito) with enough contrast on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_ALL = "#000000"


def channels_to_draw(block: GateStatistics, count: int, *, seed: int = 0) -> np.ndarray:
    """Select channels uniformly at random, and sort them by their mean gate value."""
    mean = block.mean_of_classes
    drawn = np.array(draw(range(len(mean)), count, seed=seed))
    return drawn[np.argsort(mean[drawn], kind="stable")]


def draw_classes(
    axes: Axes, block: GateStatistics, found: Excitations, channels: np.ndarray
) -> None:
    """Plot the mean gate value per channel, for each class and all classes (paper, Figure 6)."""
    x = np.arange(len(channels))
    for (label, name), colour in zip(found.drawn.items(), _cycled(len(found.drawn)), strict=True):
        axes.plot(x, block.kept[label].mean[channels], color=colour, lw=1.2, label=name)
    mean = block.mean_of_classes[channels]
    axes.plot(x, mean, color=_ALL, lw=1.6, ls="--", label=f"all {found.units}")
    _finish(axes, block, channels)


def draw_spread(
    axes: Axes, block: GateStatistics, drawn: dict[int, str], channels: np.ndarray
) -> None:
    """Plot the mean and std of the gates per channel, for two classes (paper, Figure 7)."""
    x = np.arange(len(channels))
    for (label, name), colour in list(zip(drawn.items(), COLOURS, strict=False))[:2]:
        kept = block.kept[label]
        mean, std = kept.mean[channels], kept.std[channels]
        axes.plot(x, mean, color=colour, lw=1.2, label=f"{name} ({kept.images} images)")
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.25, lw=0)
    _finish(axes, block, channels)


def _style() -> AbstractContextManager[None]:
    """Return a context manager that sets the matplotlib style for all figures."""
    return matplotlib.rc_context(
        {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
    )


def _cycled(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _finish(axes: Axes, block: GateStatistics, channels: np.ndarray) -> None:
    """Set the axis limits and labels shared by all panels."""
    axes.set_xlim(0, max(len(channels) - 1, 1))
    low, high = axes.get_ylim()
    # Show the full range of a sigmoid so that blocks can be compared. Other excitations can exceed
    # this range.
    axes.set_ylim(min(low, -0.02), max(high, 1.02))
    total = len(block.mean_of_classes)
    axes.set_xlabel(f"channel ({len(channels)} of {total}, sorted by mean)")


def write_blocks(
    found: Excitations, folder: str, *, channels: int = 50, seed: int = 0
) -> list[str]:
    """Plot the gates of each block: class means, and standard deviations within two classes.

    One PNG file per block is written.

    Args:
        found: The statistics returned by :func:`~.collect.collect_excitations`.
        folder: The output folder.
        channels: The maximum number of channels to plot per block. It is 50 in the paper.
        seed: The seed for the random selection of channels.

    Returns:
        The paths of the files.
    """
    os.makedirs(folder, exist_ok=True)
    paths = []
    with _style():
        for name, block in found.blocks.items():
            figure = Figure(figsize=(11, 3.8), layout="constrained")
            left, right = figure.subplots(1, 2, sharey=True)
            drawn = channels_to_draw(block, channels, seed=seed)
            draw_classes(left, block, found, drawn)
            draw_spread(right, block, found.drawn, drawn)
            left.set_title(f"{name}: means of {found.units}")
            right.set_title(f"{name}: mean ± standard deviation within a {found.unit}")
            left.set_ylabel("gate")
            for axes in (left, right):
                axes.legend(loc="best", fontsize=8)
            paths.append(_save(figure, folder, f"{name}.png"))
    return paths


def write_overview(
    found: Excitations, folder: str, *, channels: int = 50, seed: int = 0
) -> list[str]:
    """Plot the gates of several blocks in one figure.

    ``figure6.png`` shows the blocks returned by :func:`papers_blocks`, and ``blocks.png`` shows all
    blocks. For the arguments, see :func:`write_blocks`.

    Returns:
        The paths of the files.
    """
    os.makedirs(folder, exist_ok=True)
    with _style():
        return [
            _save(_figure6(found, channels, seed), folder, "figure6.png"),
            _save(_all_blocks(found), folder, "blocks.png"),
        ]


def papers_blocks(names: list[str]) -> list[str]:
    """Select the blocks for a figure like Figure 6 in the paper.

    The selection consists of the last block in each stage and all blocks in the last stage. If the
    last stage has more than four blocks, only the first, middle and last are selected. For a
    network without stages, up to six evenly spaced blocks are selected.
    """
    stages = sorted({stage for name in names if (stage := stage_of(name)) is not None})
    if not stages:
        return _spread(names, 6)
    last = [[n for n in names if stage_of(n) == stage][-1] for stage in stages[:-1]]
    deepest = [n for n in names if stage_of(n) == stages[-1]]
    return last + (deepest if len(deepest) <= 4 else _spread(deepest, 3))


def _spread(names: list[str], count: int) -> list[str]:
    indices = np.linspace(0, len(names) - 1, min(len(names), count)).round().astype(int)
    return [names[index] for index in indices]


def _figure6(found: Excitations, channels: int, seed: int) -> Figure:
    names = papers_blocks(list(found.blocks))
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for name, axes in zip(names, grid.flat, strict=False):
        block = found.blocks[name]
        drawn = channels_to_draw(block, channels, seed=seed)
        draw_classes(axes, block, found, drawn)
        axes.set_title(name)
    for axes in grid[:, 0]:
        axes.set_ylabel("gate")
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 5))
    return figure


def _all_blocks(found: Excitations) -> Figure:
    summaries = {name: block.summary() for name, block in found.blocks.items()}
    x = np.arange(len(summaries))
    figure = Figure(figsize=(max(5, 0.28 * len(x) + 2), 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, colour, marker in (("between", COLOURS[1], "o"), ("within", COLOURS[0], "s")):
        values = [getattr(one, name) for one in summaries.values()]
        top.plot(x, values, color=colour, marker=marker, ms=4, label=f"{name} {found.units}")
    top.set_ylabel("standard deviation\nof a gate")
    top.set_ylim(bottom=0)
    top.legend()
    bottom.bar(x, [100 * one.saturated for one in summaries.values()], color=COLOURS[2])
    bottom.set_ylabel("gates above 0.95 (%)")
    bottom.set_ylim(0, 100)
    bottom.set_xlabel("block")
    bottom.set_xticks(x, list(summaries), rotation=90, fontsize=8)
    return figure


def _save(figure: Figure, folder: str, name: str) -> str:
    path = str(Path(folder, name))
    # Omit the matplotlib version from the metadata to make the files reproducible.
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path
