#!/usr/bin/env python
"""Trains a config with several seeds, and prints mean, standard deviation and the paper's figure.

    python tools/run_seeds.py --config-file configs/cifar10_se_resnet110.yaml --seeds 0 1 2 \\
        --output output/cifar10_se_resnet110

Each seed has a folder of its own. What is finished there is not trained again, and what broke off
is taken up: after an interruption, give the same command.
"""

import argparse
import logging

from detectron2.utils.logger import setup_logger

from senet_transfer.cli.arguments import Parser
from senet_transfer.engine.launch import run_single
from senet_transfer.engine.repeated_runs import run_seeds, seeds_report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="a recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", required=True, help="folder of all runs")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of each run")
    parser.add_argument(
        "--quiet", action="store_true", help="leave the runs' logs to their log.txt"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Runs what is missing and prints the table."""
    setup_logger(name="senet_transfer").setLevel(logging.INFO)
    results = run_seeds(
        args.config_file,
        args.seeds,
        args.opts,
        args.output,
        flags=("--num-gpus", str(args.num_gpus)),
        quiet=args.quiet,
    )
    print(seeds_report(args.config_file, args.opts, results))


if __name__ == "__main__":
    run_single(main, parser().parse_args())
