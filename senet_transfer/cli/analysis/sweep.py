"""Train with several seeds or folds, and print the mean, standard deviation and paper's result.

    senet sweep --config-file configs/cifar10_se_resnet110.yaml --seeds 0 1 2 \\
        --output output/cifar10_se_resnet110

    senet sweep --config-file configs/finetune_folder.yaml --folds flowers_folds \\
        --output output/flowers_folds

Each run has a separate folder. After an interruption, repeat the command: finished runs are not
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
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to train with (0 1 2)"
    )
    runs.add_argument(
        "--folds",
        default="",
        metavar="FOLDER",
        help="train on each fold in this folder, written by senet data split --folds K",
    )
    add("--images", default="", help="image folder of detection data, for --folds")
    add("--output", required=True, help="parent folder of all runs")
    add("--num-gpus", type=int, default=1, help="number of processes per run (1)")
    add("--quiet", action="store_true", help="write the runs' logs only to their log.txt files")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train the unfinished runs and print the results table."""
    from detectron2.utils.logger import setup_logger

    from senet_transfer.analysis.repeated_runs import (
        fold_options,
        run_folds,
        run_seeds,
        runs_report,
    )

    setup_logger(name="senet_transfer").setLevel(logging.INFO)
    flags = ("--num-gpus", str(args.num_gpus))
    common = {"flags": flags, "quiet": args.quiet}
    if args.folds:
        folds = fold_options(args.config_file, args.folds, args.opts, images=args.images)
        results = run_folds(args.config_file, folds, args.opts, args.output, **common)
        options = [*args.opts, *folds["fold0"]]
    else:
        seeds = run_seeds(args.config_file, args.seeds, args.opts, args.output, **common)
        results = {f"seed {seed}": result for seed, result in seeds.items()}
        options = args.opts
    print(runs_report(args.config_file, options, results))


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
