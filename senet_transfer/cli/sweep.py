"""Train a config with several seeds, and print mean, standard deviation and the paper's figure.

    python tools/run_seeds.py --config-file configs/cifar10_se_resnet110.yaml --seeds 0 1 2 \\
        --output output/cifar10_se_resnet110

Each seed has a folder of its own. A finished run is not trained again, and an interrupted one is
resumed: after an interruption, give the same command.
"""

import argparse
import logging

from senet_transfer.cli.arguments import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, help="a recipe")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--output", required=True, help="folder of all runs")
    add("--num-gpus", type=int, default=1, help="processes of each run")
    add("--quiet", action="store_true", help="leave the runs' logs to their log.txt")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what is missing and print the table."""
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
    """Run as the command line says."""
    run_command(main, parser().parse_args(words))
