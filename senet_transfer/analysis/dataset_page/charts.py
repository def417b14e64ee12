"""Histograms for the HTML page about a dataset."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from senet_transfer.analysis.dataset_page.splits import Objects
from senet_transfer.analysis.dataset_page.statistics import AnchorFit, shares, training_scale

# Maximum number of bins in the histogram of objects per image.
_MOST_BINS = 24
# Maximum number of labels on the horizontal axis.
_MOST_TICKS = 8


def object_charts(
    cfg: CfgNode, names: Sequence[str], objects: Sequence[Objects], anchors: AnchorFit | None
) -> list[dict[str, Any]]:
    """Return histograms of object counts, sizes and aspect ratios in detection data.

    Args:
        cfg: Config of a detector.
        names: Names of the datasets, starting with the training data.
        objects: The annotated objects of each dataset.
        anchors: The largest IoU of each training object with any anchor. None if the model has no
            axis-aligned anchors.

    Returns:
        One dict per chart with ``title``, ``across`` (label of the horizontal axis), ``labels`` of
        the bins, ``ticks`` (indices of the bins whose label is shown), ``stacked`` (True if the
        bars of the series are stacked), and ``series``. Each series is a dict with ``name``,
        ``style`` and ``values`` in percent.
    """
    counts = [one.counts for one in objects]
    top = np.percentile(np.concatenate(counts), 99)
    step = max(1, math.ceil((top + 1) / _MOST_BINS))
    edges = np.arange(math.ceil((top + 1) / step) + 1) * step
    labels = [f"{low}" if step == 1 else f"{low}-{low + step - 1}" for low in edges[:-1]]
    if max(count.max() for count in counts) >= edges[-1]:
        labels[-1] = f"{edges[-2]}+"
    ratios = [_ratio(one.boxes[:, 2:] - one.boxes[:, :2]) for one in objects]
    return [
        _chart("objects per image", "objects", labels, names, counts, edges),
        _size_chart(cfg, objects[0], anchors),
        _log_chart("aspect ratio of the objects", "width / height", names, ratios, 2),
    ]


def image_charts(names: Sequence[str], sizes: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Return histograms of image sizes and aspect ratios, omitting histograms with a single bin.

    Args:
        names: Names of the datasets.
        sizes: Width and height of each image in pixels, ``(M, 2)``, for each dataset.
    """
    roots = [np.sqrt(one.prod(1)) for one in sizes]
    ratios = [_ratio(one) for one in sizes]
    charts = [
        _log_chart("size of the images", "root of the area in pixels", names, roots, 4),
        _log_chart("aspect ratio of the images", "width / height", names, ratios, 4),
    ]
    return [chart for chart in charts if len(chart["labels"]) > 1]


def _ratio(sides: np.ndarray) -> np.ndarray:
    return sides[:, 0] / np.maximum(sides[:, 1], 1e-9)


def _size_chart(cfg: CfgNode, objects: Objects, anchors: AnchorFit | None) -> dict[str, Any]:
    """Return a histogram of training object sizes, split by the largest IoU with any anchor."""
    scale = training_scale(cfg, objects.sizes)[objects.images]
    sides = (objects.boxes[:, 2:] - objects.boxes[:, :2]) * scale
    values = np.sqrt(sides.clip(0).prod(1))
    across = "root of the area in pixels, after resizing"
    fits = np.ones(len(values), bool) if anchors is None else anchors.overlaps >= 0.5
    groups = [values[fits], values[~fits]]
    chart = _log_chart("size of the training objects", across, ["", ""], groups, 2)
    total = max(len(values), 1)
    for series, name, style, group in zip(
        chart["series"],
        ("an anchor has an IoU of 0.5 or more", "no anchor has"),
        ("hit", "wrong"),
        groups,
        strict=True,
    ):
        part = len(group) / total
        series |= {"name": name, "style": style, "values": [v * part for v in series["values"]]}
    if anchors is None:
        chart["series"] = [{**chart["series"][0], "name": "training objects"}]
    return {**chart, "stacked": True}


def _log_chart(
    title: str,
    across: str,
    names: Sequence[str],
    values: Sequence[np.ndarray],
    bins_per_octave: int,
) -> dict[str, Any]:
    values = [np.maximum(one, 1 / 64) for one in values]
    all_values = np.concatenate([*values, np.ones(0 if any(map(len, values)) else 1)])
    # Bins are centred on powers of two.
    steps = np.rint(np.log2(all_values) * bins_per_octave)
    powers = np.arange(steps.min(), steps.max() + 2)
    middles = (2 ** (powers[:-1] / bins_per_octave)).tolist()
    labels = [f"{middle:.0f}" if middle >= 100 else f"{middle:.3g}" for middle in middles]
    edges = 2 ** ((powers - 0.5) / bins_per_octave)
    chart = _chart(title, across, labels, names, values, edges)
    octaves = np.flatnonzero(powers[:-1] % bins_per_octave == 0).tolist()
    if len(octaves) > 1:
        chart["ticks"] = octaves[:: math.ceil(len(octaves) / _MOST_TICKS)]
    return chart


def _chart(
    title: str,
    across: str,
    labels: list[str],
    names: Sequence[str],
    values: Iterable[np.ndarray],
    edges: np.ndarray,
) -> dict[str, Any]:
    series = [
        {"name": name, "style": f"c{index % 10}", "values": shares(one, edges).tolist()}
        for index, (name, one) in enumerate(zip(names, values, strict=True))
    ]
    ticks = list(range(0, len(labels), math.ceil(len(labels) / _MOST_TICKS)))
    return {
        "title": title, "across": across, "labels": labels, "ticks": ticks, "series": series,
        "stacked": False,
    }  # fmt: skip
