"""Evaluate a classifier: top-1 and top-5 error, and the worst and most confused classes.

Evaluate on the ImageNet validation set (one folder per class), and print published errors:
    senet eval --model se_resnet50 --weights se_resnet50.pth \\
        --data imagenet/val --output results.json

Evaluate a checkpoint of a run, with the config.yaml next to it:
    senet eval --weights output/model_best.pth --data flowers/val
"""

import argparse
from collections.abc import Sequence
from typing import Any

from senet_transfer.cli.arguments import (
    EVAL_MODES,
    Parser,
    add_model_arguments,
    add_running_arguments,
    run_command,
)

_PLACES365 = """\
Evaluate a classifier on the Places365 validation set, and compare it with Table VI of the paper.

    %(prog)s --model se_resnet152 --weights FILE --data datasets/places365/val --output results.json

--data is one of: a folder of shards written by datasets/prepare_places365.py; the folder that
contains the lists and val_256 or val_large; the folder val_256 or val_large; or the archive
val_256.tar next to the lists.
"""


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=description)
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--data", default="", help="shards, a folder, a CSV file or an archive; default: the "
        "config's DATASETS.TEST",
    )  # fmt: skip
    add("--output", default="", help="JSON file to write")
    add("--crop-mode", choices=EVAL_MODES, help="default: the mode in the config, or short_side")
    add("--resize", type=int, help="resize size in pixels; default: the model's size")
    add("--crop", type=int, help="crop size in pixels; default: the model's size")
    add(
        "--predictions",
        default="",
        help="CSV file to write, with the key, label, five most probable classes and path of each "
        "image",
    )
    add("--logits", action="store_true", help="add the logits to the CSV file")
    add_running_arguments(parser)
    return parser


def main(args: argparse.Namespace, published: Sequence[Any] = ()) -> dict[str, Any]:
    """Evaluate the classifier, print the results and return them.

    Args:
        args: The arguments parsed by :func:`parser`.
        published: Published results on the same data to print for comparison.
    """
    from senet_transfer.engine.inference.evaluate import run_evaluation
    from senet_transfer.engine.model_from import find_model

    found = find_model(
        args.model, args.config_file, args.weights, family=args.family, options=args.opts
    )
    results = run_evaluation(
        found,
        device=args.device,
        data=args.data,
        mode=args.crop_mode or "",
        resize=args.resize,
        crop=args.crop,
        batch_size=args.batch_size,
        workers=args.workers,
        output=args.output,
        predictions=args.predictions,
        keep_logits=args.logits,
        published=published,
        quiet=args.quiet,
    )
    _print(results)
    return results


def _main_places365(args: argparse.Namespace) -> None:
    from senet_transfer.evaluation.paper_results import PLACES365

    main(args, PLACES365)


def _print(results: dict[str, Any]) -> None:
    rows = [{**results, "name": results["model"], "source": "this run"}, *results["published"]]
    width = max(len(row["name"]) for row in rows)
    print(f"{results['images']} images, {results['images_per_second']:.1f} images/s")
    print(f"{'':{width}}  top-1 error  top-5 error")
    for row in rows:
        top5 = "-" if row["top5_error"] is None else f"{row['top5_error']:.2f}"
        print(f"{row['name']:{width}}  {row['top1_error']:11.2f}  {top5:>11}  ({row['source']})")
    print("Worst classes (top-1 error, images):")
    for row in results["worst_classes"]:
        print(f"  {row['top1_error']:6.2f}  {row['images']:6d}  {row['class']}")
    print("Most confused (images):")
    for row in results["most_confused"]:
        print(f"  {row['images']:6d}  {row['class']} predicted as {row['taken_for']}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))


def command_places365(words: list[str] | None = None) -> None:
    """Parse the arguments and evaluate on Places365."""
    run_command(_main_places365, parser(_PLACES365).parse_args(words))
