"""Formatting of parameter counts and multiply-accumulates as table rows."""

from senet_transfer.analysis.complexity.count import Cost
from senet_transfer.analysis.complexity.paper_tables import Compared

COST_HEADERS = ("", "parameters", "GMACs", "activations", "SE parameters", "SE MACs")

PAPER_HEADERS = (
    "table", "network", "Params", "ours", "off", "GFLOPs", "ours", "off", ""
)  # fmt: skip


def cost_row(name: str, cost: Cost) -> tuple[str, ...]:
    """Format a cost as a table row with the columns :data:`COST_HEADERS`."""
    return (
        name,
        f"{cost.parameters:,}",
        f"{cost.macs / 1e9:.3f}",
        f"{cost.activations:,}",
        _share(cost.se_parameters, cost.parameters),
        _share(cost.se_macs, cost.macs),
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f}%)" if part else "-"


def paper_rows(found: list[Compared]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the rows and footnotes of a table that compares networks with the paper.

    The rows contain parameter counts and GFLOPs, as counted and as reported in the paper, in the
    columns :data:`PAPER_HEADERS`. The footnotes explain differences; the last column contains
    their numbers.
    """
    reasons: list[str] = []
    rows: list[tuple[str, ...]] = []
    for one in found:
        reasons += [reason for reason in one.reasons if reason not in reasons]
        mark = " ".join(f"({reasons.index(reason) + 1})" for reason in one.reasons)
        rows.append((one.row.table, one.row.name, *_parameters(one), *_gflops(one), mark))
    return rows, [f"({number}) {text}" for number, text in enumerate(reasons, start=1)]


def _parameters(one: Compared) -> tuple[str, str, str]:
    stated, off = one.row.parameters, one.parameters_off
    if stated is None or off is None:
        return "", "", ""
    return f"{stated:.1f}M", f"{one.parameters / 1e6:.2f}M", f"{off / 1e6:+.2f}M"


def _gflops(one: Compared) -> tuple[str, str, str]:
    stated, off = one.row.gflops, one.gflops_off
    if stated is None or off is None:
        return "", "", ""
    digits = 3 if stated >= 1 else 4
    ours = f"{one.report.total.macs / 1e9:.{digits}f}"
    return f"{stated:.{digits - 1}f}", ours, f"{100 * off:+.2f}%"
