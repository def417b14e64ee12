"""Writer for the HTML report on training runs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from senet_transfer.analysis.report.classification import confusion_galleries
from senet_transfer.analysis.report.detection import detection_galleries
from senet_transfer.analysis.report.diagnostics import detection_diagnostics
from senet_transfer.analysis.report.html import write_html
from senet_transfer.analysis.report.paper_rows import has_gates, paper_row
from senet_transfer.analysis.report.pictures import data_uri
from senet_transfer.analysis.report.run_folder import Run, config_texts, data_label, parse_metric
from senet_transfer.config import get_senet_config
from senet_transfer.models.build import backbone_name

# Maximum number of points per curve.
MOST_POINTS = 400

# Metrics in the results table, and their decimal places. Other metrics are shown only as curves.
_SHOWN = {"AP": 2, "AP50": 2, "AP75": 2, "top1_error": 2, "top5_error": 2, "images": 0}

# Maximum length of a config value in characters. The full value is in the run's config.yaml.
_LONGEST = 240

_NAMES = {"top1_error": "top-1 error", "top5_error": "top-5 error"}


def write_report(
    runs: list[Run],
    output: Path,
    *,
    images: int = 240,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> None:
    """Write an HTML report on one or more training runs.

    Args:
        runs: The runs returned by :func:`~.run_folder.load_runs`.
        output: The HTML file, which is written atomically.
        images: The maximum number of detection images, about 40 KB each. The maximum number of
            classification images, which are smaller, is four times as high.
        say: A function that is called with a message if an image can't be shown.
        quiet: If True, show no progress bars.

    Raises:
        UserError: If the file can't be written.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    data: dict[str, Any] = {
        "runs": [run.name for run in runs],
        "curves": _curves(runs),
        "diagnostics": detection_diagnostics(runs, note),
        "detection": detection_galleries(runs, images, note, quiet=quiet),
        "classification": confusion_galleries(runs, 4 * images, note, quiet=quiet),
    }
    write_html(
        output,
        "page.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        data=data,
        notes=notes,
        summaries=[_summary(run) for run in runs],
        results=[row for run in runs for row in _results(run)],
        tables=_class_tables(runs, data["classification"]),
        differences=_differences(runs),
        constants=[
            (name, "NaN" if value is None else f"{value:.4g}")
            for name, value in _constants(runs).items()
            if not parse_metric(name)  # The tables contain the results of evaluations.
        ],
        excitations=_excitations(runs),
        without_excitations=[run for run in runs if has_gates(run.cfg) and not _figures(run)],
        runs=runs,
    )


def _curves(runs: list[Run]) -> dict[str, dict[int, list[list[float]]]]:
    """Return subsampled curves by metric and run, except for per-class and constant metrics."""
    curves: dict[str, dict[int, list[list[float]]]] = {}
    constants = _constants(runs)
    for position, run in enumerate(runs):
        for name, points in run.curves.items():
            if _class_of(name) or name in constants:
                continue
            step = -(-len(points) // MOST_POINTS)
            kept = points[::step] if points[-1] in points[::step] else [*points[::step], points[-1]]
            short = [[iteration, float(f"{value:.5g}")] for iteration, value in kept]
            curves.setdefault(name, {})[position] = short
    return curves


def _constants(runs: list[Run]) -> dict[str, float | None]:
    """Return the metrics that stay constant, with their values; None stands for NaN or infinity."""
    values: dict[str, set[float | None]] = {}
    for run in runs:
        for name, points in run.curves.items():
            if not _class_of(name):
                finite = {value if math.isfinite(value) else None for _, value in points}
                values.setdefault(name, set()).update(finite)
    return {name: found.pop() for name, found in sorted(values.items()) if len(found) == 1}


def _class_of(name: str) -> str | None:
    """Return the class of a per-class AP metric, or None for other metrics."""
    found = parse_metric(name)
    return found[2][3:] if found and found[2].startswith("AP-") else None


def _summary(run: Run) -> dict[str, str]:
    done = run.iterations
    if run.is_finished:
        state = f"finished, {done:,} iterations"
    elif done:
        left = f", about {_time(run.eta_seconds)} remaining" if run.eta_seconds else ""
        state = f"{done:,} iterations done{left}"
    else:
        state = "evaluated only" if run.results else "nothing logged yet"
    return {
        "name": run.name,
        "state": state,
        "model": f"{run.cfg.MODEL.META_ARCHITECTURE}, {backbone_name(run.cfg)}",
        "data": ", ".join(map(data_label, run.cfg.DATASETS.TEST)) or "-",
        "time": _time(run.seconds),
        "memory": f"{run.memory_mb:,.0f} MB" if run.memory_mb else "-",
        "device": _device(run),
        "torch": _version(run, "torch"),
    }


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _device(run: Run) -> str:
    if run.cfg.MODEL.DEVICE == "cpu":
        return "CPU"
    for line in run.environment.splitlines():
        if line.startswith("GPU ") and not line.startswith("GPU available"):
            return " ".join(line.split()[2:])
    return run.cfg.MODEL.DEVICE


def _version(run: Run, package: str) -> str:
    for line in run.environment.splitlines():
        if line.startswith(f"{package}=="):
            return line.partition("==")[2]
    return "-"


def _results(run: Run) -> list[dict[str, Any]]:
    """Return table rows that compare the run with the paper, one per dataset and task."""
    rows = []
    kinds = dict.fromkeys((data, task) for data, task, _ in run.results)
    for data, task in kinds:
        name = data or next(iter(run.cfg.DATASETS.TEST), "")
        images = run.value(data, task, "images")
        paper = paper_row(run.cfg, name, task.removesuffix("_TTA"), images)
        metrics = []
        for metric, digits in _SHOWN.items():
            ours = run.value(data, task, metric)
            if ours is None or not math.isfinite(ours):
                continue
            theirs = paper.values.get(metric) if paper else None
            metrics.append({
                "name": _NAMES.get(metric, metric),
                "ours": f"{ours:,.{digits}f}",
                "paper": "" if theirs is None else f"{theirs:.{digits}f}",
                "difference": "" if theirs is None else f"{ours - theirs:+.{digits}f}",
            })  # fmt: skip
        rows.append({
            "run": run.name, "data": data_label(name), "task": task, "metrics": metrics,
            "paper": paper,
        })  # fmt: skip
    return rows


def _class_tables(runs: list[Run], classification: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tables of the AP or top-1 error by class and run, sorted by the worst run's value.

    The worst class comes first.
    """
    tables = []
    by_data: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for position, run in enumerate(runs):
        for (data, task, metric), value in run.results.items():
            if metric.startswith("AP-"):
                name = data or ", ".join(run.cfg.DATASETS.TEST)
                cells = by_data.setdefault((name, task), {}).setdefault(metric[3:], {})
                cells[position] = value
    for (data, task), rows in by_data.items():
        tables.append(_class_table(f"{task} AP on {data}", rows, runs, worst=min))
    for gallery in classification:
        rows = {
            name: {k: errors[label] for k, errors in gallery["errors"].items()}
            for label, name in enumerate(gallery["classes"])
        }
        title = f"top-1 error on {gallery['data']}"
        tables.append(_class_table(title, rows, runs, worst=max))
    return tables


def _class_table(
    title: str, rows: dict[str, dict[int, float]], runs: list[Run], *, worst: Callable
) -> dict[str, Any]:
    present = sorted({position for cells in rows.values() for position in cells})
    finite = {
        name: {k: value for k, value in cells.items() if math.isfinite(value)}
        for name, cells in rows.items()
    }
    sign = 1 if worst is min else -1
    order = sorted(
        (name for name in finite if finite[name]),
        key=lambda name: (sign * worst(finite[name].values()), name),
    )
    return {
        "title": title,
        "runs": [runs[position].name for position in present],
        "rows": [(name, [finite[name].get(position) for position in present]) for name in order],
        "left_out": len(rows) - len(order),
    }


def _figures(run: Run) -> list[Path]:
    """Return the paths of figures written by tools/analyze_excitations.py to the run's folder."""
    paths = [run.folder / "excitations" / name for name in ("figure6.png", "blocks.png")]
    return [path for path in paths if path.is_file()]


def _excitations(runs: list[Run]) -> list[dict[str, str]]:
    found = [(run, path) for run in runs for path in _figures(run)]
    side = 1100 if len(found) <= 8 else 640
    pictures = []
    for run, path in found:
        with Image.open(path) as image:
            source, _ = data_uri(np.asarray(image.convert("RGB")), side)
        pictures.append({"run": run.name, "name": path.stem, "src": source})
    return pictures


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the config keys that differ between runs, with their values for each run.

    A single run is compared with the defaults. In this case, the default values come first.
    """
    flat = [config_texts(run.cfg) for run in runs]
    if len(runs) == 1:
        flat.insert(0, config_texts(get_senet_config()))
    keys = sorted(set().union(*flat))
    rows = [(key, [values.get(key, "(absent)") for values in flat]) for key in keys]
    return [(key, [_cut(value) for value in row]) for key, row in rows if len(set(row)) > 1]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
