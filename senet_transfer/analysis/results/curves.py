"""Figures of evaluation metrics over the course of training, for recorded runs."""

import csv
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure

from senet_transfer.analysis.results.tables import (
    METRICS,
    TRANSFER,
    Records,
    baselines,
    is_probe,
    network_of,
    read_records,
    with_se,
)
from senet_transfer.errors import UserError

# Blue and orange of a colour-blind safe palette (Okabe and Ito).
_PLAIN, _SE = "#0072B2", "#D55E00"


def draw_curves(records: str | Path, folder: str | Path) -> list[Path]:
    """Plot evaluation metrics over the course of training, with one figure per baseline.

    A figure compares the network with and without SE and, if such runs are recorded, training from
    scratch with fine-tuning from pretrained weights. The lines show the mean over the runs, and the
    shaded areas show the range from the lowest to the highest value.

    Args:
        records: The folder of the records.
        folder: The output folder for the figures, ``curves_<config>.png``.

    Returns:
        The paths of the figures. There is no figure for runs with a single evaluation.

    Raises:
        UserError: If there are no records, or a file can't be read or written.
    """
    found = {name: runs for name, runs in read_records(records).items() if not is_probe(runs[0])}
    written = []
    for name in baselines(found):
        if name.startswith(TRANSFER):
            continue
        names = [name, with_se(name, found)]
        names += [TRANSFER + one for one in names]
        curves = {one: evaluations(Path(records, one), found[one]) for one in names if one in found}
        if max(map(len, curves.values())) < 2:
            continue
        path = Path(folder, f"curves_{name}.png")
        try:
            _draw(curves, found).savefig(path, dpi=110, metadata={"Software": None})
        except OSError as error:
            raise UserError(f"The figure {path} can't be written: {error}.") from error
        written.append(path)
    return written


def _draw(curves: dict[str, dict[int, list[float]]], records: dict[str, Records]) -> Figure:
    first = records[next(iter(curves))][0]
    metric = str(first["metric"])
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure((6.0, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for name, curve in curves.items():
            record, is_se = records[name][0], "_se_" in name
            pretrained = name.startswith(TRANSFER)
            count = len(records[name])
            label = f"{network_of(record, is_se=is_se)}, {count} run{'s' * (count > 1)}"
            colour, line = _SE if is_se else _PLAIN, "--" if pretrained else "-"
            steps, values = list(curve), curve.values()
            axes.plot(steps, list(map(fmean, values)), line, color=colour, label=label)
            low, high = list(map(min, values)), list(map(max, values))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        axes.set_xlabel("training step")
        axes.set_ylabel(METRICS.get(metric, metric))
        axes.set_title(first["data"])
        axes.legend()
    return figure


def evaluations(folder: Path, records: Records) -> dict[int, list[float]]:
    """Read the evaluation results at the iterations at which all runs were evaluated.

    Args:
        folder: The folder with the records of one config.
        records: The records of this config.

    Returns:
        A dict from iteration to the values of the recorded metric, such as the top-1 error, with
        one value per run.

    Raises:
        UserError: If a curve can't be read.
    """
    runs = []
    for record in records:
        path = folder / f"seed{record['seed']}.csv"
        try:
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
            runs.append({int(row[0]): float(row[2]) for row in rows[1:] if row[2]})
        except (OSError, ValueError, IndexError) as error:
            raise UserError(
                f"{path} can't be read as a training curve: {error}. Delete the record of this "
                "run, and write it again with senet sweep --results."
            ) from error
    return {step: [run[step] for run in runs] for step in runs[0] if all(step in r for r in runs)}
