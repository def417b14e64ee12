"""Train the SE variants of the paper's ablations on your data, and compare them with the paper.

    senet ablation --config-file configs/cifar10_se_resnet20.yaml --list
    senet ablation --config-file configs/cifar10_se_resnet20.yaml --seeds 0 1 2 \\
        --output output/ablation
    senet ablation --config-file configs/finetune_folder.yaml --axes squeeze placement \\
        --output output/flowers_ablation DATASETS.TRAIN "('flowers/train',)" \\
        DATASETS.TEST "('flowers/val',)"

Each variant changes one key in MODEL.SE of the configured network. Each run has a separate folder.
After an interruption, repeat the command: finished runs are not trained again, and an unfinished
run is resumed. The exit status is 75 if runs are unfinished. To match the networks in the paper's
ablations, set MODEL.SE.BIAS to False.
"""

import argparse
import logging

from senet_transfer.cli.arguments import ABLATION_AXES, Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    parser.lists = ("--axes", "--seeds")
    add = parser.add_argument
    add("--config-file", required=True, help="config file of a classifier")
    add(
        "--axes",
        action="append",
        choices=ABLATION_AXES,
        default=[],
        help="one or more SE options to vary; default: all",
    )
    add(
        "--seeds",
        type=int,
        action="append",
        default=[],
        help="one or more seeds for each variant (default: 0)",
    )
    add(
        "--output",
        default="output/ablation",
        help="parent folder of all runs (default: output/ablation)",
    )
    add("--list", action="store_true", help="list the variants and their complexity, and exit")
    add("--num-gpus", type=int, default=1, help="number of processes per run (default: 1)")
    add(
        "--quiet",
        action="store_true",
        help="write each run's log only to its log.txt file, not to the terminal",
    )
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Execute the unfinished training runs and print the results table."""
    from detectron2.utils.logger import setup_logger

    from senet_transfer.analysis.ablation import grid, grid_table, run_grid, write_grid
    from senet_transfer.engine.signals import STATUS

    setup_logger(name="senet_transfer").setLevel(logging.INFO)
    variants = grid(args.config_file, args.opts, args.axes)
    if args.list:
        print(grid_table(variants))
        return
    results, unfinished = run_grid(
        args.config_file,
        variants,
        args.seeds or [0],
        args.output,
        flags=("--num-gpus", str(args.num_gpus)),
        quiet=args.quiet,
    )
    print(grid_table(variants, results))
    print(f"Wrote {write_grid(variants, results, args.output)}")
    if unfinished:
        print(f"Unfinished runs: {unfinished}. Repeat the command to continue.")
        raise SystemExit(STATUS)


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
