"""Train with several seeds, and print the mean, standard deviation and the result in the paper.

    python tools/run_seeds.py --config-file configs/cifar10_se_resnet110.yaml --seeds 0 1 2 \\
        --output output/cifar10_se_resnet110

Each seed has a separate folder. After an interruption, repeat the command: finished runs are not
trained again, and an unfinished run is resumed.
"""

import argparse
import logging

from senet_transfer.cli.arguments import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, help="config file to train with")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to train with (0 1 2)")
    add("--output", required=True, help="parent folder of all runs")
    add("--num-gpus", type=int, default=1, help="number of processes per run (1)")
    add("--quiet", action="store_true", help="write the runs' logs only to their log.txt files")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train the unfinished runs and print the results table."""
    from detectron2.utils.logger import setup_logger

    from senet_transfer.analysis.repeated_runs import run_seeds, seeds_report

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


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
