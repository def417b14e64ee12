"""Evaluate a classifier: top-1 and top-5 error, worst classes and most confused class pairs.

Detectors are evaluated with the metrics of their datasets. If several detectors are given, their
boxes are fused.

Evaluate on the ImageNet validation set (one folder per class), and print published errors:
    senet eval --model se_resnet50 --weights se_resnet50.pth \\
        --data imagenet/val --output results.json

Evaluate a checkpoint of a run, with the config.yaml next to it:
    senet eval --weights output/model_best.pth --data flowers/val

Evaluate ten crops at three scales, and average the probabilities of two models:
    senet eval --scales 224 256 320 --crops 10 --weights a.pth b.pth --data flowers/val
"""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from senet_transfer.cli.arguments import (
    CROPS,
    EVAL_MODES,
    Parser,
    add_model_arguments,
    add_running_arguments,
    run_command,
)
from senet_transfer.errors import UserError
from senet_transfer.utils.text import counted

if TYPE_CHECKING:
    from senet_transfer.engine.model_from import ModelSource

_BATCH_SIZE = 32

# Options for the crops and scales of a classifier's input. --scales also applies to detectors.
_VIEWS = ("crop_mode", "resize", "crop", "crops", "dense")

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
    add_model_arguments(parser, several=True)
    parser.lists = ("--weights", "--scales", "--saved-logits")
    add = parser.add_argument
    add(
        "--data", default="", help="shards, a folder, a CSV file or an archive; default: the "
        "config's DATASETS.TEST",
    )  # fmt: skip
    add("--output", default="", help="JSON file to write")
    add(
        "--crop-mode",
        choices=EVAL_MODES,
        help="how images are resized and cropped; default: the mode in the config, otherwise "
        "short_side",
    )
    add("--resize", type=int, help="image size in pixels after resizing; default: the model's size")
    add("--crop", type=int, help="crop size in pixels; default: the model's size")
    add(
        "--scales", type=int, action="append", default=[], help="one or more sizes of the "
        "shorter side in pixels; the predictions for all scales and crops are combined per image",
    )  # fmt: skip
    add(
        "--crops", type=int, choices=CROPS, help="number of crops per scale; default: 10 if the "
        "crop mode is ten_crop, otherwise 1",
    )  # fmt: skip
    add(
        "--dense",
        action="store_true",
        help="apply the network to whole resized images instead of crops",
    )
    add(
        "--predictions",
        default="",
        help="CSV file to write, with a unique key, the label, the five most probable classes and "
        "the path of each image",
    )
    add("--logits", action="store_true", help="add the logits to the CSV file")
    add(
        "--saved-logits", action="append", default=[], metavar="FILE", help="evaluate saved "
        "logits instead of a model: one or more CSV files written with --predictions and --logits; "
        "the class probabilities are averaged over the files",
    )  # fmt: skip
    add_running_arguments(parser)
    parser.set_defaults(batch_size=None)  # None: not passed by the user
    return parser


def main(args: argparse.Namespace, published: Sequence[Any] = ()) -> dict[str, Any]:
    """Evaluate the classifiers or detectors, print the results and return them.

    Args:
        args: The arguments parsed by :func:`parser`.
        published: Published results on the same data to print for comparison.
    """
    from senet_transfer.config import is_classification
    from senet_transfer.data.images.multi_scale import ViewOptions
    from senet_transfer.engine.inference.evaluate import run_evaluation, run_saved_evaluation
    from senet_transfer.engine.model_from import find_model

    options = {
        "output": args.output,
        "predictions": args.predictions,
        "keep_logits": args.logits,
        "published": published,
    }
    if args.saved_logits:
        _check_saved(args)
        results = run_saved_evaluation(args.saved_logits, **options)
        _print(results)
        return results
    views = ViewOptions(
        mode=args.crop_mode or "",
        resize=args.resize,
        crop=args.crop,
        scales=tuple(args.scales),
        crops=args.crops,
        dense=args.dense,
    )
    sources = [
        find_model(args.model, args.config_file, weights, family=args.family, options=args.opts)
        for weights in args.weights or [""]
    ]
    if args.weights and not is_classification(sources[0].cfg):
        return _evaluate_detectors(args, sources[0])
    results = run_evaluation(
        sources,
        device=args.device,
        data=args.data,
        views=views,
        batch_size=_BATCH_SIZE if args.batch_size is None else args.batch_size,
        workers=args.workers,
        quiet=args.quiet,
        **options,
    )
    _print(results)
    return results


def _check_saved(args: argparse.Namespace) -> None:
    """Raise a UserError if arguments that require a model are combined with --saved-logits."""
    names = ("model", "family", "weights", "config_file", "data", *_VIEWS, "scales", "batch_size")
    if given := _given(args, (*names, "opts")):
        raise UserError(
            f"{given} can't be combined with --saved-logits, which evaluates saved logits instead "
            "of a model. Remove --saved-logits or the other options."
        )


def _evaluate_detectors(args: argparse.Namespace, first: "ModelSource") -> dict[str, Any]:
    """Evaluate a detector, or the fused detections of several detectors.

    The values of ``--weights`` and ``--scales`` are passed to the evaluation as the config keys
    ``MODEL.WEIGHTS``, ``TEST.ENSEMBLE.WEIGHTS`` and ``TEST.AUG``.
    """
    from senet_transfer.engine.results import write_results
    from senet_transfer.engine.setup import RunOptions
    from senet_transfer.engine.train import main as evaluate

    names = ("model", "family", "data", *_VIEWS, "predictions", "logits", "batch_size")
    if given := _given(args, names):
        raise UserError(
            f"{given} can't be used for a detector, and {args.weights[0]} contains a detector. "
            "Remove these options. To select the datasets of a detector, set DATASETS.TEST. The "
            "batch size of detectors is always 1."
        )
    options = ["DATALOADER.NUM_WORKERS", str(args.workers), *args.opts]
    options += ["MODEL.WEIGHTS", args.weights[0]]
    if args.weights[1:] or "TEST.ENSEMBLE.WEIGHTS" not in args.opts[::2]:
        options += ["TEST.ENSEMBLE.WEIGHTS", str(tuple(args.weights[1:]))]
    if args.device:
        options += ["MODEL.DEVICE", args.device]
    if args.scales:
        options += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", str(tuple(args.scales))]
    if "OUTPUT_DIR" not in args.opts[::2]:
        # The files of the training run must not be overwritten.
        is_file = os.path.isfile(args.weights[0])
        folder = os.path.dirname(args.weights[0]) if is_file else "output"
        options += ["OUTPUT_DIR", os.path.join(folder, "evaluation")]
    run = RunOptions(first.config_file, options, eval_only=True, quiet=args.quiet)
    results = {
        **evaluate(run),
        "weights": args.weights,
        "scales": args.scales or [first.cfg.INPUT.MIN_SIZE_TEST],
    }
    if args.output:
        write_results(args.output, results)
    return results


def _given(args: argparse.Namespace, names: Sequence[str]) -> str:
    """Return a comma-separated list of the options in ``names`` that the user has set."""
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    flags["opts"] = " ".join(args.opts)
    return ", ".join(flags[name] for name in names if getattr(args, name))


def _main_places365(args: argparse.Namespace) -> None:
    from senet_transfer.evaluation.paper_results import PLACES365

    main(args, PLACES365)


def _print(results: dict[str, Any]) -> None:
    rows = [{**results, "name": results["model"], "source": "this run"}, *results["published"]]
    width = max(len(row["name"]) for row in rows)
    print(f"{counted(results['images'], 'image')}, {results['images_per_second']:.1f} images/s")
    print(f"{'':{width}}  top-1 error  top-5 error")
    for row in rows:
        top5 = "-" if row["top5_error"] is None else f"{row['top5_error']:.2f}"
        print(f"{row['name']:{width}}  {row['top1_error']:11.2f}  {top5:>11}  ({row['source']})")
    print("Worst classes (top-1 error, number of images):")
    for row in results["worst_classes"]:
        print(f"  {row['top1_error']:6.2f}  {row['images']:6d}  {row['class']}")
    print("Most confused classes (number of images):")
    for row in results["most_confused"]:
        print(f"  {row['images']:6d}  {row['class']} predicted as {row['predicted']}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))


def command_places365(words: list[str] | None = None) -> None:
    """Parse the arguments and evaluate a classifier on Places365."""
    run_command(_main_places365, parser(_PLACES365).parse_args(words))
