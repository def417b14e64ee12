"""Train a config with several seeds; print the mean, standard deviation and the paper's result.

    python tools/run_seeds.py --config-file configs/cifar10_se_resnet110.yaml --seeds 0 1 2 \\
        --output output/cifar10_se_resnet110

Each seed has its own folder. After an interruption, repeat the command: finished runs are not
trained again, and an unfinished run is resumed.
"""

import argparse
import logging

from senet_transfer.cli.arguments import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, help="config to train")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (0 1 2)")
    add("--output", required=True, help="folder of all runs")
    add("--num-gpus", type=int, default=1, help="number of processes per run (1)")
    add("--quiet", action="store_true", help="write the logs of the runs only to their log.txt")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train the missing runs and print the table of results."""
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
