"""Count the parameters, multiply-accumulates and activations of a model and of its SE gates.

    senet complexity --model se_resnet50
    senet complexity --model resnet50 --model "se_resne*" --size 320
    senet complexity --model se_resnet50 MODEL.SE.RATIO 8 MODEL.RESNETS.STRIDE_IN_1X1 True
    senet complexity --config-file configs/faster_rcnn_se_r50.yaml --size 800 1333
    senet complexity --weights output/model_final.pth

Compare the parameter counts and GFLOPs of this project's networks with those in the paper:
    senet complexity --paper
"""

import argparse

from senet_transfer.cli.arguments import Parser, run_command
from senet_transfer.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    parser.lists = ("--size",)
    add = parser.add_argument
    add("--model", action="append", default=[], help="model name or pattern; can be repeated")
    add("--config-file", default="", help="config of a classifier or detector, instead of --model")
    add(
        "--weights",
        default="",
        help="checkpoint or weight file from which the layer options, such as strides, stem "
        "pooling and SE biases, are detected, and also the architecture if neither --model nor "
        "--config-file is given",
    )
    add(
        "--size",
        type=int,
        action="append",
        help="image size in pixels: height and width, or one side length",
    )
    add(
        "--paper",
        action="store_true",
        help="compare this project's networks with all published values in the paper",
    )
    add("--quiet", action="store_true", help="hide the progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Count the parameters and multiply-accumulates of the models, and print the results."""
    from tabulate import tabulate

    from senet_transfer.analysis.complexity.breakdown import report
    from senet_transfer.analysis.complexity.tables import COST_HEADERS, cost_row
    from senet_transfer.engine.model_from import build_to_count, model_config
    from senet_transfer.models import list_models

    if args.paper:
        _print_paper(args)
        return
    if args.size and len(args.size) > 2:
        raise UserError(
            f"--size has {len(args.size)} values; expected height and width, or one side length."
        )
    size = (args.size[0], args.size[-1]) if args.size else None
    names = [found for name in args.model for found in list_models(name) or [name]]
    reports, notes = [], []
    for name in names or [""]:
        cfg = model_config(name, args.config_file, args.weights, args.opts)
        reports.append(report(build_to_count(cfg), cfg, size))
        notes += reports[-1].notes
    if cfg.MODEL.WEIGHTS and not args.weights:
        notes.append(
            "The counts are for the layer options in the config, such as strides, stem pooling "
            f"and SE biases. A run uses those of the weight file {cfg.MODEL.WEIGHTS}. To use the "
            "file's layer options for the counts, pass it as --weights."
        )
    if len(reports) == 1:
        rows = [cost_row(name, cost) for name, cost in reports[0].parts.items()]
        rows.append(cost_row("all", reports[0].total))
        print(f"For an image of {reports[0].size[0]} x {reports[0].size[1]} pixels:")
    else:
        rows = [
            cost_row(f"{name}, {found.size[0]} x {found.size[1]}", found.total)
            for name, found in zip(names, reports, strict=True)
        ]
    print(tabulate(rows, COST_HEADERS, disable_numparse=True, colalign=("left", *["right"] * 5)))
    for note in dict.fromkeys(notes):
        print(note)


def _print_paper(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    from senet_transfer.analysis.complexity.paper_tables import compare_with_paper
    from senet_transfer.analysis.complexity.tables import PAPER_HEADERS, paper_rows

    if args.model or args.config_file or args.weights or args.size or args.opts:
        raise UserError(
            "--paper uses fixed models and image sizes. Remove --model, --config-file, --weights, "
            "--size and config options."
        )
    rows, reasons = paper_rows(compare_with_paper(quiet=args.quiet))
    right = ("left", "left", *["right"] * 6, "left")
    print(tabulate(rows, PAPER_HEADERS, disable_numparse=True, colalign=right))
    for reason in reasons:
        print(reason)


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
