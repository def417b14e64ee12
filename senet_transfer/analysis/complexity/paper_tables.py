"""Comparison of parameter and MAC counts with the tables of the SENet paper.

Paper: "Squeeze-and-Excitation Networks", Tables II, III, X, XIII, XV and XVI. GFLOPs in the paper
are multiply-accumulates for one image, and Params include the running statistics of batch norms. In
Table II, each stage of a residual network has its stride in the first 1x1 convolution. In the
ablations (section 6), the gates have no biases.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from senet_transfer.analysis.complexity.breakdown import Report, report
from senet_transfer.analysis.complexity.count import Cost
from senet_transfer.engine.model_from import build_to_count, model_config
from senet_transfer.models.backbones.inception_resnet import InceptionResidualBlock
from senet_transfer.utils.progress import progress

# Tolerances for differences from the paper's values. Larger differences need an explanation.
GFLOPS_TOLERANCE = 0.005
PARAMETERS_TOLERANCE = 0.1e6

_STRIDE = ("MODEL.RESNETS.STRIDE_IN_1X1", "True")
_ABLATION = (*_STRIDE, "MODEL.SE.BIAS", "False")


@dataclass(frozen=True)
class Row:
    """A network in one of the paper's tables.

    Attributes:
        table: Table number.
        name: Network name in the paper.
        model: Network name in this project.
        options: Alternating config keys and values.
        parameters: Number of parameters in millions. None if the table doesn't report it.
        gflops: Number of multiply-accumulates in billions. None if the table doesn't report it.
        side: Side length of the square input image in pixels.
    """

    table: str
    name: str
    model: str
    options: tuple[str, ...] = ()
    parameters: float | None = None
    gflops: float | None = None
    side: int = 224


def _pair(
    name: str, model: str, gflops: float, se_gflops: float, *options: str, side: int = 224
) -> tuple[Row, Row]:
    return (
        Row("II", name, model, options, None, gflops, side),
        Row("II", f"SE-{name}", f"se_{model}", options, None, se_gflops, side),
    )


def _ablation(table: str, name: str, parameters: float, gflops: float | None, *options: str) -> Row:
    model = "se_resnet50" if options else "resnet50"
    return Row(table, name, model, (*_ABLATION, *options), parameters, gflops)


_STANDARD = ("MODEL.SE.RATIO", "16")

ROWS = (
    *_pair("ResNet-50", "resnet50", 3.86, 3.87, *_STRIDE),
    *_pair("ResNet-101", "resnet101", 7.58, 7.60, *_STRIDE),
    *_pair("ResNet-152", "resnet152", 11.30, 11.32, *_STRIDE),
    *_pair("ResNeXt-50", "resnext50_32x4d", 4.24, 4.25),
    *_pair("ResNeXt-101", "resnext101_32x4d", 7.99, 8.00),
    *_pair("VGG-16", "vgg16_bn", 15.47, 15.48),
    *_pair("BN-Inception", "bn_inception", 2.03, 2.04),
    *_pair("Inception-ResNet-v2", "inception_resnet_v2", 11.75, 11.76, side=299),
    Row("III", "MobileNet", "mobilenet", (), 4.2, 0.569),
    Row("III", "SE-MobileNet", "se_mobilenet", (), 4.7, 0.572),
    Row("III", "ShuffleNet", "shufflenet_g3", (), 1.8, 0.140),
    Row("III", "SE-ShuffleNet", "se_shufflenet_g3", (), 2.4, 0.142),
    _ablation("X", "r = 2", 45.7, None, "MODEL.SE.RATIO", "2"),
    _ablation("X", "r = 4", 35.7, None, "MODEL.SE.RATIO", "4"),
    _ablation("X", "r = 8", 30.7, None, "MODEL.SE.RATIO", "8"),
    _ablation("X", "r = 16", 28.1, None, *_STANDARD),
    _ablation("X", "r = 32", 26.9, None, "MODEL.SE.RATIO", "32"),
    _ablation("X", "original", 25.6, None),
    _ablation("XIII", "ResNet-50", 25.6, 3.86),
    _ablation("XIII", "SE_Stage_2", 25.6, 3.86, "MODEL.SE.STAGES", "(2,)"),
    _ablation("XIII", "SE_Stage_3", 25.7, 3.86, "MODEL.SE.STAGES", "(3,)"),
    _ablation("XIII", "SE_Stage_4", 26.4, 3.86, "MODEL.SE.STAGES", "(4,)"),
    _ablation("XIII", "SE_All", 28.1, 3.87, *_STANDARD),
    _ablation("XV", "SE", 28.1, 3.87, *_STANDARD),
    _ablation("XV", "SE_3x3", 25.8, 3.86, "MODEL.SE.PLACEMENT", "3x3"),
    _ablation("XVI", "ResNet-50", 25.6, 3.86),
    _ablation("XVI", "NoSqueeze", 28.1, 4.27, "MODEL.SE.SQUEEZE", "none"),
    _ablation("XVI", "SE", 28.1, 3.87, *_STANDARD),
)


@dataclass(frozen=True)
class Compared:
    """Parameter and MAC counts of a network, and the row of the paper's table for this network.

    Attributes:
        row: Row of the paper's table.
        parameters: Counted number of parameters, including the running statistics of norms as in
            the paper.
        report: Counted parameters and MACs.
        explanation: Possible reason why the paper's GFLOPs differ. Empty if none is known.
    """

    row: Row
    parameters: int
    report: Report
    explanation: str

    @property
    def parameters_off(self) -> float | None:
        """Difference between the counted and the published number of parameters.

        None if the paper doesn't report the number.
        """
        stated = self.row.parameters
        return None if stated is None else self.parameters - 1e6 * stated

    @property
    def gflops_off(self) -> float | None:
        """Relative difference between the counted and the published GFLOPs.

        None if the paper doesn't report GFLOPs.
        """
        stated = self.row.gflops
        return None if stated is None else self.report.total.macs / (1e9 * stated) - 1

    @property
    def reasons(self) -> list[str]:
        """Explanation for each value that differs from the paper by more than the tolerance."""
        found = []
        if abs(self.gflops_off or 0) > GFLOPS_TOLERANCE:
            found.append(self.explanation or f"{self.row.name}: unexplained difference in GFLOPs.")
        stated = self.row.parameters
        if stated is not None and abs(self.parameters - 1e6 * stated) > PARAMETERS_TOLERANCE:
            weights = self.report.total.parameters
            close = abs(weights - 1e6 * stated) <= PARAMETERS_TOLERANCE
            found.append(
                f"{self.row.name} has {weights / 1e6:.2f}M weights and biases. The number in the "
                "paper doesn't include the running statistics of norms."
                if close
                else f"{self.row.name}: unexplained difference in Params."
            )
        return found


def _without_gates(cost: Cost) -> int:
    return cost.macs - cost.se_macs


def _inception_resnet_v2(model: nn.Module, found: Report) -> str:
    """Explain why the GFLOPs of Inception-ResNet-v2 differ from those in the SENet paper.

    Published versions of Inception-ResNet-v2 have different numbers of residual blocks.
    """
    blocks: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, InceptionResidualBlock):
            cost = _without_gates(found.modules[name]) / 1e9
            blocks.setdefault(name.rpartition(".")[0], []).append(cost)
    numbers = ", ".join(str(len(costs)) for costs in blocks.values())
    each = [costs[0] for costs in blocks.values()]
    total = _without_gates(found.total) / 1e9
    fewer = total - 5 * (each[0] + each[-1])
    return (
        f"This is the published network, as in timm and pretrainedmodels. It has {numbers} "
        f"residual blocks with {', '.join(f'{cost:.3f}' for cost in each)} GMACs each, and "
        f"{total:.2f} GMACs in total. With 5 blocks each of the first and the last kind, it would "
        f"have {fewer:.2f} GMACs. The paper doesn't specify which of these networks was counted."
    )


def _shufflenet_g3(model: nn.Module, found: Report) -> str:
    """Explain why the GFLOPs of ShuffleNet 1x (g = 3) differ from those in the SENet paper.

    The SENet paper's number equals the ShuffleNet paper's number for 2 groups in the pointwise
    convolutions, but the network has 3 groups.
    """
    two, three = (_shufflenet_macs(groups, width) / 1e6 for groups, width in ((2, 200), (3, 240)))
    return (
        "The ShuffleNet paper (Table 1) reports 140 MFLOPs for 2 groups in the pointwise "
        "convolutions and 137 MFLOPs for 3 groups, both without the classifier. Counted layer by "
        f"layer, these two variants need {two:.1f} and {three:.1f} MMACs. This network has 3 "
        f"groups and needs {_without_gates(found.total) / 1e6:.1f} MMACs with the classifier."
    )


def _shufflenet_macs(groups: int, width: int) -> int:
    """Compute ShuffleNet's MACs without the classifier, from Table 1 of the ShuffleNet paper."""
    channels, macs = 24, 24 * 3 * 9 * 112**2
    for level, units in enumerate((4, 8, 4)):
        outputs, places = width * 2**level, (28 // 2**level) ** 2
        inner = outputs // 4
        first = channels * inner * 4 * places // (groups if level else 1)
        macs += first + (9 + (outputs - channels) // groups) * inner * places
        macs += (units - 1) * (2 * outputs // groups + 9) * inner * places
        channels = outputs
    return macs


# Functions that explain differences from the paper, keyed by baseline network.
_REASONS: dict[str, Callable[[nn.Module, Report], str]] = {
    "inception_resnet_v2": _inception_resnet_v2,
    "shufflenet_g3": _shufflenet_g3,
}


def compare_with_paper(rows: tuple[Row, ...] = ROWS, *, quiet: bool = False) -> list[Compared]:
    """Count the parameters and MACs of the networks in the paper's tables.

    Args:
        rows: The table rows, each of which specifies a network.
        quiet: If True, show no progress bar. The bar is also hidden if stderr isn't a terminal.

    Returns:
        One comparison with the paper per row.
    """
    # Some networks appear in several tables. Each is counted only once.
    counted: dict[tuple, tuple[int, Report, str]] = {}
    for row in progress(rows, unit="network", quiet=quiet):
        if _network(row) not in counted:
            counted[_network(row)] = _count(row)
    return [Compared(row, *counted[_network(row)]) for row in rows]


def _network(row: Row) -> tuple:
    return row.model, row.options, row.side


def _count(row: Row) -> tuple[int, Report, str]:
    cfg = model_config(model=row.model, options=list(row.options))
    model = build_to_count(cfg)
    found = report(model, cfg, (row.side, row.side))
    statistics = [b.numel() for name, b in model.named_buffers() if "running_" in name]
    explain = _REASONS.get(row.model.removeprefix("se_"))
    reason = explain(model, found) if explain else ""
    return found.total.parameters + sum(statistics), found, reason
