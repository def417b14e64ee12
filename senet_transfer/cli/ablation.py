"""Train the paper's variants of SE on one's own data, and rank them next to the paper's.

    python tools/ablation.py --config-file configs/cifar10_se_resnet20.yaml --list
    python tools/ablation.py --config-file configs/cifar10_se_resnet20.yaml --seeds 0 1 2 \\
        --output output/ablation
    python tools/ablation.py --config-file configs/finetune_folder.yaml --axes squeeze placement \\
        --output output/flowers_ablation DATASETS.TRAIN "('flowers/train',)" \\
        DATASETS.TEST "('flowers/val',)"

Each variant differs from the config's network in one key of MODEL.SE, and each run has a folder of
its own: a finished run is not trained again, and an interrupted one is resumed. After an
interruption, give the same command. The paper's networks have MODEL.SE.BIAS False.
"""

import argparse
import logging

from senet_transfer.cli.arguments import ABLATION_AXES, Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, help="the recipe of a classifier")
    add("--axes", nargs="+", choices=ABLATION_AXES, default=[], help="what to vary; default: all")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--output", default="output/ablation", help="folder of all runs (output/ablation)")
    add("--list", action="store_true", help="only show the variants and what they cost")
    add("--num-gpus", type=int, default=1, help="processes of each run")
    add("--quiet", action="store_true", help="leave the runs' logs to their log.txt")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what is missing and print the table."""
    from detectron2.utils.logger import setup_logger

    from senet_transfer.analysis.ablation import grid, grid_table, run_grid, write_grid

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


def command(words: list[str] | None = None) -> None:
    """Run as the command line says."""
    run_command(main, parser().parse_args(words))
