"""Train a model with several seeds or folds, and compare the results with the paper.

    senet sweep --config-file configs/cifar10_se_resnet110.yaml --seeds 0 1 2 \\
        --output output/cifar10_se_resnet110

    senet sweep --config-file configs/finetune_folder.yaml --folds flowers_folds \\
        --output output/flowers_folds

Train a network with and without SE, stop after 40 minutes, and record finished runs:
    senet sweep --config-file configs/cifar10_resnet20.yaml \\
        --config-file configs/cifar10_se_resnet20.yaml --output output --minutes 40 \\
        --results results

Update the result tables in Markdown files from the recorded results:
    senet sweep --results results --update README.md docs/results.md

Each run has a separate folder. After an interruption, repeat the command: finished runs are not
trained again, and an unfinished run is resumed. The exit status is 75 if runs are unfinished.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from senet_transfer.cli.arguments import Parser, run_command
from senet_transfer.errors import UserError

if TYPE_CHECKING:
    from senet_transfer.analysis.repeated_runs import Run


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    parser.lists = ("--seeds", "--update")
    add = parser.add_argument
    add(
        "--config-file",
        action="append",
        default=[],
        help="config file to train with; can be repeated to compare configs",
    )
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument(
        "--seeds",
        type=int,
        action="append",
        default=[],
        help="one or more seeds to train with (default: 0 1 2)",
    )
    runs.add_argument(
        "--folds",
        default="",
        metavar="FOLDER",
        help="train once per fold; FOLDER is written by senet data split --folds K",
    )
    add(
        "--images",
        default="",
        help="image folder for the annotations in --folds; required for detectors",
    )
    add(
        "--output",
        default="",
        help="parent folder of all runs; with several configs, each config has a subfolder",
    )
    add("--num-gpus", type=int, default=1, help="number of processes per run (default: 1)")
    add("--jobs", type=int, default=1, help="number of runs to execute in parallel (default: 1)")
    add(
        "--minutes",
        type=float,
        help="after this many minutes, save checkpoints and stop; repeat the command to continue",
    )
    add(
        "--results",
        default="",
        metavar="FOLDER",
        help="write the results of each finished run to FOLDER/<config>/seed<N>.json",
    )
    add(
        "--update",
        action="append",
        default=[],
        metavar="DOCUMENT",
        help="update the result tables in one or more Markdown files from the files in --results",
    )
    add(
        "--curves",
        default="",
        metavar="FOLDER",
        help="plot the metrics over the course of training from the files in --results; each "
        "figure compares a network with and without SE on one dataset",
    )
    add(
        "--quiet",
        action="store_true",
        help="write each run's log only to its log.txt file, not to the terminal",
    )
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Execute the unfinished training runs, and update the requested tables and figures."""
    from detectron2.utils.logger import setup_logger

    from senet_transfer.analysis.results.curves import draw_curves
    from senet_transfer.analysis.results.tables import update_documents
    from senet_transfer.engine.signals import STATUS

    _check(args)
    setup_logger(name="senet_transfer").setLevel(logging.INFO)
    unfinished = _train(args) if args.config_file else 0
    if args.update:
        update_documents(args.results, args.update)
    if args.curves:
        draw_curves(args.results, args.curves)
    if unfinished:
        print(f"Unfinished runs: {unfinished}. Repeat the command to continue.")
        raise SystemExit(STATUS)


def _check(args: argparse.Namespace) -> None:
    """Raise a UserError if arguments are missing, out of range or incompatible."""
    documents = args.update or args.curves
    if not args.config_file and not documents:
        raise UserError("There is nothing to do. Pass --config-file, or --update with --results.")
    if args.config_file and not args.output:
        raise UserError("--output is missing. Set it to the parent folder of all runs.")
    if documents and not args.results:
        raise UserError(
            "--results is missing; --update and --curves read the results from this folder. Pass "
            "--results FOLDER."
        )
    if args.folds and (args.results or len(args.config_file) > 1):
        raise UserError(
            "--folds requires exactly one --config-file and does not support --results."
        )
    if args.jobs < 1 or (args.minutes is not None and args.minutes <= 0):
        raise UserError(
            f"--jobs is {args.jobs} and --minutes is {args.minutes}; expected 1 or more jobs, and "
            "more than 0 minutes."
        )


def _train(args: argparse.Namespace) -> int:
    """Execute all runs, print a table per config, and return the number of unfinished runs."""
    from senet_transfer.analysis.repeated_runs import run_all, runs_report
    from senet_transfer.analysis.results.records import write_record

    by_config = {config: _runs(args, config) for config in args.config_file}
    # Train all configs with one seed before the next seed, to make early comparisons possible.
    runs = [run for group in zip(*by_config.values(), strict=True) for run in group]
    done = run_all(
        runs,
        jobs=args.jobs,
        minutes=args.minutes,
        on_finish=lambda run: write_record(run, args.results) if args.results else None,
        flags=("--num-gpus", str(args.num_gpus)),
        quiet=args.quiet,
    )
    results = dict(zip(runs, done, strict=True))
    for config, group in by_config.items():
        found = {run.output_dir.name: results[run] for run in group}
        found = {name: result for name, result in found.items() if result is not None}
        if found:
            print(runs_report(config, group[0].options, found))
    return done.count(None)


def _runs(args: argparse.Namespace, config: str) -> "list[Run]":
    """Return the training runs of a config, one per fold or seed."""
    from senet_transfer.analysis.repeated_runs import fold_options, fold_runs, seed_runs

    several = len(args.config_file) > 1
    folder = Path(args.output, Path(config).stem) if several else Path(args.output)
    if args.folds:
        folds = fold_options(config, args.folds, args.opts, images=args.images)
        return fold_runs(config, folds, args.opts, folder)
    return seed_runs(config, args.seeds or [0, 1, 2], args.opts, folder)


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
