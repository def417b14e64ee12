"""Training runs for the SENet paper's ablation studies (section 6), with any classifier config."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from senet_transfer.analysis.complexity.breakdown import report
from senet_transfer.analysis.complexity.count import Cost
from senet_transfer.analysis.excitations.collect import backbone_of
from senet_transfer.analysis.excitations.gates import gates_of, stage_of
from senet_transfer.analysis.repeated_runs import mean_and_deviation, run_all, seed_runs
from senet_transfer.config import is_classification
from senet_transfer.data.build import use_classification_datasets
from senet_transfer.engine.model_from import build_to_count, model_config
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import write_json

METRIC = "classification/top1_error"

STANDARD, PLAIN = "standard", "no SE"

_KEYS = {
    "ratio": "MODEL.SE.RATIO",
    "squeeze": "MODEL.SE.SQUEEZE",
    "excitation": "MODEL.SE.EXCITATION",
    "stages": "MODEL.SE.STAGES",
    "placement": "MODEL.SE.PLACEMENT",
    "bias": "MODEL.SE.BIAS",
}

# Top-1 error of SE-ResNet-50 on ImageNet in percent, by key in ``MODEL.SE`` and value (paper,
# Tables X to XVI). None if the paper reports no value.
PAPER: dict[str, dict[str, float | None]] = {
    "ratio": {"2": 22.29, "4": 22.25, "8": 22.26, "16": 22.28, "32": 22.72},
    "squeeze": {"max": 22.57, "avg": 22.28, "none": 22.93},
    "excitation": {"relu": 23.47, "tanh": 23.00, "sigmoid": 22.28},
    "stages": {"2": 23.03, "3": 23.04, "4": 22.68, "5": None},
    "placement": {
        "standard": 22.28, "pre": 22.23, "post": 22.78, "identity": 22.20, "3x3": 22.48
    },
    "bias": {"True": None, "False": None},
}  # fmt: skip
_PAPER_STANDARD, _PAPER_PLAIN = 22.28, 23.30


@dataclass(frozen=True)
class Variant:
    """A variant of a network in an ablation study.

    Attributes:
        axis: The key in ``MODEL.SE`` that differs from the original config, in lower case. Empty
            for the network with the original config and for the network without SE.
        value: The value of this key. If ``axis`` is empty, ``"standard"`` or ``"no SE"``.
        options: Alternating keys and values that override the config.
        paper: The top-1 error of this variant of SE-ResNet-50 on ImageNet in the SENet paper, in
            percent. None if the paper doesn't report it.
        cost: The parameter count and the multiply-accumulates of the network. None if the network
            can't be built.
        refused: The reason why the network can't be built. Empty if the network can be built.
    """

    axis: str
    value: str
    options: tuple[str, ...]
    paper: float | None
    cost: Cost | None = None
    refused: str = ""

    @property
    def folder(self) -> str:
        """Name of the variant's subfolder in the output folder."""
        return f"{self.axis}_{self.value}" if self.axis else self.value.replace(" ", "_")


def grid(config_file: str, options: Sequence[str] = (), axes: Sequence[str] = ()) -> list[Variant]:
    """Create the ablation variants of a network, each of which changes one key in ``MODEL.SE``.

    Args:
        config_file: A classifier's config file.
        options: Alternating keys and values that override the config for all variants.
        axes: The keys in ``MODEL.SE`` to vary, a subset of the keys of :data:`PAPER`. If empty, all
            keys of :data:`PAPER` are varied.

    Returns:
        The network with the original config, the network without SE, and the variants for each key.
        Variants that are identical to the original network are omitted. If a variant can't be
        built, such as "3x3" in basic blocks, the attribute ``refused`` contains the reason.

    Raises:
        UserError: If a key is not in :data:`PAPER`, or if the config does not define a classifier
            with SE that is evaluated on one dataset.
    """
    unknown = [axis for axis in axes if axis not in PAPER]
    if unknown:
        raise UserError(
            f"The ablation axis {unknown[0]!r} is unknown; expected one or more of: "
            f"{', '.join(PAPER)}."
        )
    options = (*options, "MODEL.SE.ENABLED", "True")
    cfg = model_config(config_file=config_file, options=list(options))
    if not is_classification(cfg):
        raise UserError(
            f"MODEL.META_ARCHITECTURE in {config_file} is {cfg.MODEL.META_ARCHITECTURE}; expected "
            "ImageClassifier."
        )
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(
            f"DATASETS.TEST is {cfg.DATASETS.TEST}; expected a single dataset for comparing the "
            "variants."
        )
    # Training takes the number of classes from the data, which may not exist yet.
    with suppress(UserError):
        use_classification_datasets(cfg)
    options = ("MODEL.CLASSIFIER.NUM_CLASSES", str(cfg.MODEL.CLASSIFIER.NUM_CLASSES), *options)
    plain = (*options[:-1], "False")
    found = [
        Variant("", STANDARD, options, _PAPER_STANDARD),
        Variant("", PLAIN, plain, _PAPER_PLAIN),
    ]
    stages = _stages(cfg)
    for axis in axes or PAPER:
        for value, paper in PAPER[axis].items():
            text = f"({value},)" if axis == "stages" else value
            there = _KEYS[axis], text
            if axis == "stages" and int(value) not in stages or _has(cfg, *there):
                continue
            found.append(Variant(axis, value, (*options, *there), paper))
    return [_counted(config_file, variant) for variant in found]


def _stages(cfg: CfgNode) -> set[int | None]:
    return {stage_of(name) for name in gates_of(backbone_of(build_to_count(cfg)))}


def _has(cfg: CfgNode, key: str, value: str) -> bool:
    node, _, leaf = key.removeprefix("MODEL.").rpartition(".")
    return str(cfg.MODEL[node][leaf]) == value


def _counted(config_file: str, variant: Variant) -> Variant:
    parts = (variant.axis, variant.value, variant.options, variant.paper)
    try:
        cfg = model_config(config_file=config_file, options=list(variant.options))
        return Variant(*parts, report(build_to_count(cfg), cfg).total)
    except UserError as error:
        return Variant(*parts, refused=str(error))


def run_grid(
    config_file: str,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    output_dir: str | Path,
    **arguments: Any,
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Train each variant with each seed, skipping variants that can't be built.

    Args:
        config_file: The config file that was passed to :func:`grid`.
        variants: The variants returned by :func:`grid`.
        seeds: The values for ``SEED``.
        output_dir: The parent folder of all runs. Finished runs in this folder are skipped, and
            interrupted runs are resumed.
        arguments: Keyword arguments for :func:`senet_transfer.analysis.repeated_runs.run_all`.

    Returns:
        A mapping from :attr:`Variant.folder` to the results of the variant's finished runs, and
        the number of unfinished runs.
    """
    by_variant = {
        variant.folder: seed_runs(
            config_file, seeds, variant.options, Path(output_dir) / variant.folder
        )
        for variant in variants
        if variant.cost is not None
    }
    # Train all variants with one seed before starting the next seed, so that the variants can be
    # compared even if the grid is interrupted.
    runs = [run for group in zip(*by_variant.values(), strict=True) for run in group]
    done = run_all(runs, **arguments)
    found = {run: result for run, result in zip(runs, done, strict=True) if result is not None}
    results = {
        name: [found[run] for run in group if run in found] for name, group in by_variant.items()
    }
    return {name: group for name, group in results.items() if group}, done.count(None)


def grid_table(
    variants: Sequence[Variant], results: dict[str, list[dict[str, Any]]] | None = None
) -> str:
    """Format a table with the cost, the measured error and the paper's error of each variant.

    For a variant that changes a config key, each error is followed by its rank in parentheses among
    the errors for all values of this key, including the original value. Rank 1 is the lowest error.
    """
    errors = {
        variant.folder: mean_and_deviation(results[variant.folder])[METRIC]
        for variant in variants
        if results and variant.folder in results
    }
    rows = []
    for variant in variants:
        rivals = [v for v in variants if v.axis == variant.axis or v.value == STANDARD]
        ours = {v.folder: errors[v.folder][0] for v in rivals if v.folder in errors}
        paper = {v.folder: v.paper for v in rivals if v.paper is not None}
        ranked = bool(variant.axis)
        rows.append(
            [
                variant.axis,
                variant.value,
                f"{variant.cost.parameters:,}" if variant.cost else "-",
                f"{variant.cost.macs / 1e6:.1f}" if variant.cost else "-",
                _error(errors.get(variant.folder)) + _rank(variant, ours, ranked),
                "" if variant.paper is None
                else f"{variant.paper:.2f}" + _rank(variant, paper, ranked),
            ]
        )  # fmt: skip
    headers = ("", "", "parameters", "MMACs", "top-1 error", "paper's, on ImageNet")
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
    refused = [f"{v.axis} {v.value}: {v.refused}" for v in variants if v.refused]
    return "\n".join([table, *refused])


def _error(found: tuple[float, float] | None) -> str:
    if found is None:
        return ""
    mean, deviation = found
    # The standard deviation of a single run is NaN, which is not equal to itself.
    return f"{mean:.2f}" if deviation != deviation else f"{mean:.2f} ± {deviation:.2f}"


def _rank(variant: Variant, values: dict[str, float], ranked: bool) -> str:
    if not ranked or variant.folder not in values:
        return ""
    return f" ({1 + sum(value < values[variant.folder] for value in values.values())})"


def write_grid(
    variants: Sequence[Variant], results: dict[str, list[dict[str, Any]]], output_dir: str | Path
) -> str:
    """Write the variants and their results to ``ablation.json``.

    Returns:
        The path of the file.
    """
    path = Path(output_dir) / "ablation.json"
    rows = [
        {
            "axis": variant.axis,
            "value": variant.value,
            "options": variant.options,
            "parameters": variant.cost.parameters if variant.cost else None,
            "macs": variant.cost.macs if variant.cost else None,
            "paper_top1_error": variant.paper,
            "refused": variant.refused,
            "results": results.get(variant.folder, []),
        }
        for variant in variants
    ]
    write_json(path, rows)
    return str(path)
