"""Tables of recorded results, and the documents that contain them.

A document contains a table between two comments::

    <!-- results: NAME ... -->
    <!-- end of results -->

NAME is the name of a baseline config, such as ``cifar10_resnet20``. The results of this config are
compared with those of the config with SE. Without names, the table contains all results.
"""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from senet_transfer.analysis.report.paper_rows import paper_row
from senet_transfer.analysis.results.records import read_record, training_difference
from senet_transfer.analysis.results.welch import difference
from senet_transfer.config.load import load_config
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_path
from senet_transfer.utils.text import mean_text

Records = list[dict[str, Any]]

_BEGIN, _END = r"<!-- results:?((?: \w+)*) -->\n", "<!-- end of results -->"
METRICS = {"classification/top1_error": "top-1 error (%)", "bbox/AP": "box AP"}
TRANSFER = "transfer_"
_MINUS = "\N{MINUS SIGN}"
_NOT_PUBLISHED = "- / -"


def read_records(folder: str | Path) -> dict[str, Records]:
    """Return the records of runs in a folder, keyed by config name and sorted by seed.

    Raises:
        UserError: If the folder does not exist, or a file is not the record of a run.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"The results folder {folder} does not exist; expected a folder that contains files "
            "named CONFIG/seedN.json. Check the path."
        )
    found: dict[str, Records] = {}
    for path in sorted(Path(folder).glob("*/seed*.json")):
        found.setdefault(path.parent.name, []).append(read_record(path))
    return {name: sorted(records, key=lambda r: r["seed"]) for name, records in found.items()}


def update_documents(folder: str | Path, documents: Sequence[str | Path]) -> None:
    """Update the result tables in documents from the records in a folder.

    Raises:
        UserError: If a document can't be read or contains no placeholder for a table.
    """
    records = read_records(folder)
    for path in map(Path, documents):
        try:
            text = path.read_text(encoding="utf-8")
            updated = updated_text(text, records)
        except (OSError, UserError) as error:
            raise UserError(f"The tables in {path} can't be updated. {error}") from error
        if updated != text:
            with atomic_path(path) as partial:
                Path(partial).write_text(updated, encoding="utf-8")


def updated_text(text: str, records: dict[str, Records]) -> str:
    """Return a document's text with updated result tables.

    Raises:
        UserError: If the text contains no placeholder for a table.
    """

    def table(match: re.Match[str]) -> str:
        names = match[1].split()
        rows = comparison(records, names) if names else full_tables(records)
        return match[0].partition("\n")[0] + f"\n{rows}\n{_END}"

    updated, count = re.subn(f"{_BEGIN}.*?{_END}", table, text, flags=re.S)
    if not count:
        raise UserError(
            "The document contains no placeholder for a result table; expected the lines <!-- "
            f"results --> and {_END}. Add them."
        )
    return updated


def full_tables(records: dict[str, Records]) -> str:
    """Return the tables of all results: networks with and without SE, and transfer learning."""
    parts = [comparison(records, baselines(records), details=True)]
    carried = [name for name in records if name.removeprefix(TRANSFER) in records]
    if carried := [name for name in carried if name.startswith(TRANSFER)]:
        parts.append(transfer(records, carried))
    return "\n\n".join(parts)


def baselines(records: dict[str, Records]) -> list[str]:
    """Return the names of the configs without SE for all recorded runs.

    For a run with SE, this is the config of the same network without SE.
    """
    return sorted({name.replace("_se_", "_") for name in records})


def comparison(records: dict[str, Records], names: Sequence[str], *, details: bool = False) -> str:
    """Return a table that compares networks without and with SE.

    The column for the paper's values is omitted if it would be empty.

    Args:
        records: The records, keyed by config name.
        names: The configs of the networks without SE.
        details: If True, add columns for the length of training, the machine and the time.
    """
    header = ["data and metric", "network", "runs (without / with SE)", "without SE", "with SE",
              "difference"]  # fmt: skip
    rows, published = [], []
    for name in names:
        found = [records.get(name, []), records.get(with_se(name, records), [])]
        first = next((some[0] for some in found if some), None)
        if first is None:
            raise UserError(f"There are no results for the config {name}. Correct the name.")
        _check_comparable(*found)
        rows.append(
            [
                f"{first['data']}, {METRICS.get(first['metric'], first['metric'])}",
                network_of(first),
                " / ".join(str(len(some)) for some in found),
                *_columns(*map(_values, found)),
                *([_details(first), _machine(found)] if details else []),
            ]
        )
        published.append(" / ".join(map(_paper, found)))
    if details:
        header += ["training", "machine, minutes per run"]
    if set(published) - {_NOT_PUBLISHED}:
        header.append("paper")
        rows = [[*row, cell] for row, cell in zip(rows, published, strict=True)]
    return _table(header, rows)


def transfer(records: dict[str, Records], names: Sequence[str]) -> str:
    """Return a table that compares training from scratch with fine-tuning pretrained weights.

    Args:
        records: The records, keyed by config name.
        names: The configs with pretrained initial weights, whose names start with ``transfer_``.
    """
    rows = []
    for name in names:
        found = [records[name.removeprefix(TRANSFER)], records[name]]
        _check_comparable(*found)
        first = found[0][0]
        rows.append(
            [
                f"{first['data']}, {METRICS.get(first['metric'], first['metric'])}",
                network_of(first, is_se="_se_" in name),
                " / ".join(str(len(some)) for some in found),
                *_columns(*map(_values, found)),
            ]
        )
    header = ["data and metric", "network", "runs (random / pretrained)", "random weights",
              "pretrained", "difference"]  # fmt: skip
    return _table(header, rows)


def _check_comparable(first: Records, second: Records) -> None:
    """Raise a UserError if the data or the training options of two networks differ."""
    if first and second and (unlike := training_difference(first, second)):
        names = " and ".join(records[0]["config"] for records in (first, second))
        found = " and ".join(str(records[0][unlike]) for records in (first, second))
        raise UserError(
            f"The results of {names} can't be compared, because they differ in {unlike}: {found}. "
            "Repeat the runs of one config with the settings of the other config."
        )


def with_se(name: str, records: dict[str, Records]) -> str:
    """Return the config name of a baseline's SE counterpart, such as ``cifar10_se_resnet20``.

    Return "" if there are no records of the counterpart.
    """
    return next((se for se in records if se != name and se.replace("_se_", "_") == name), "")


def network_of(record: dict[str, Any], *, is_se: bool = False) -> str:
    """Return the display name of a record's network, or of its SE counterpart if ``is_se``."""
    before, resnet, depth = record["network"].rpartition("ResNet-")
    carried = ", pretrained" if record["config"].startswith(TRANSFER) else ""
    return f"{before}{'SE-' if is_se else ''}{resnet}{depth}{carried}"


def is_probe(record: dict[str, Any]) -> bool:
    """Return whether a record describes a linear probe."""
    return "images" in record["training"]


def _values(records: Records) -> list[float]:
    return [record["metrics"][record["metric"]] for record in records]


def _columns(first: list[float], second: list[float]) -> list[str]:
    cells = [*(mean_text(values) if values else "-" for values in (first, second)), "-"]
    if first and second:
        shift, half = difference(first, second)
        cells[2] = _signed(shift)
        if not math.isnan(half):
            cells[2] += f" ({_signed(shift - half)} to {_signed(shift + half)})"
    return cells


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", _MINUS)


def _paper(records: Records) -> str:
    """Return the paper's value for the network, or "-" if the paper doesn't report it."""
    if not records or is_probe(records[0]):
        return "-"
    record = records[0]
    try:
        cfg = load_config(record["config"], record["options"])
    except UserError:  # A user's own config has no counterpart in the paper.
        return "-"
    task, _, value = record["metric"].partition("/")
    tested = cfg.DATASETS.TEST[0]
    # cifar10_jpeg contains the images of CIFAR-10, compressed as JPEG. The paper's closest results
    # are those on CIFAR-10.
    row = paper_row(cfg, "cifar10_test" if tested == "cifar10_jpeg" else tested, task)
    return f"{row.values[value]:.2f}" if row else "-"


def _details(record: dict[str, Any]) -> str:
    training = record["training"]
    if is_probe(record):
        return f"{training['images']:,} images, features of {record['config'].partition('_')[2]}"
    link = f"[{record['config']}](../configs/{record['config']}.yaml)"
    pairs = zip(record["options"][::2], record["options"][1::2], strict=True)
    options = ", ".join(f"`{key} {value}`" for key, value in pairs)
    return f"{training['steps']:,} steps of {training['images_per_step']} images, {link}" + (
        f" with {options}" if options else ""
    )


def _machine(found: Sequence[Records]) -> str:
    devices = dict.fromkeys(r["machine"]["device"] for records in found for r in records)
    return f"{', '.join(devices)}; {' / '.join(map(_minutes, found))}"


def _minutes(records: Records) -> str:
    """Return the mean training time in minutes, or "-" if the time of any run is unknown."""
    times = [record["training"]["minutes"] for record in records]
    return f"{statistics.fmean(times):.1f}" if times and None not in times else "-"


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "No runs have been recorded."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
