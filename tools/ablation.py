#!/usr/bin/env python
"""Trains the paper's variants of SE on one's own data, beside the paper's order.

    python tools/ablation.py --config-file configs/cifar10_se_resnet20.yaml --list
    python tools/ablation.py --config-file configs/cifar10_se_resnet20.yaml --seeds 0 1 2 \\
        --output output/ablation
    python tools/ablation.py --config-file configs/finetune_folder.yaml --axes squeeze placement \\
        --output output/flowers_ablation DATASETS.TRAIN "('flowers/train',)" \\
        DATASETS.TEST "('flowers/val',)"

Each variant differs from the config's network in one key of MODEL.SE, and each run has a folder of
its own: what is finished there is not trained again, and what broke off is taken up. After an
interruption, give the same command. The paper's networks have MODEL.SE.BIAS False.
"""

import argparse
import logging

from detectron2.utils.logger import setup_logger

from senet_transfer.analysis.ablation import PAPER, grid, grid_table, run_grid, write_grid
from senet_transfer.cli.arguments import Parser
from senet_transfer.engine.launch import run_single


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, help="the recipe of a classifier")
    add("--axes", nargs="+", choices=PAPER, default=[], help="what to vary; default: all")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--output", default="output/ablation", help="folder of all runs (output/ablation)")
    add("--list", action="store_true", help="only show the variants and what they cost")
    add("--num-gpus", type=int, default=1, help="processes of each run")
    add("--quiet", action="store_true", help="leave the runs' logs to their log.txt")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Runs what is missing and prints the table."""
    setup_logger(name="senet_transfer").setLevel(logging.INFO)
    variants = grid(args.config_file, args.opts, args.axes)
    if args.list:
        print(grid_table(variants))
        return
    results = run_grid(
        args.config_file,
        variants,
        args.seeds,
        args.output,
        flags=("--num-gpus", str(args.num_gpus)),
        quiet=args.quiet,
    )
    print(grid_table(variants, results))
    print(f"Written: {write_grid(variants, results, args.output)}")


if __name__ == "__main__":
    run_single(main, parser().parse_args())
