"""Predict on images with a trained checkpoint.

With a detector, the detections are drawn on the images and written as a JSON in COCO's format. With
a classifier, the five most probable classes of each image are printed and written as a JSON.
"""

import argparse

from senet_transfer.cli.arguments import Parser, run_command
from senet_transfer.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="a checkpoint of a trained model")
    add("--config-file", default="", help="config; default: the config.yaml next to the weights")
    add("--input", nargs="+", required=True, help="image files, folders of images, or patterns")
    add("--output", required=True, help="folder for the drawings and the JSON")
    add("--threshold", type=float, default=0.5, help="minimum score, 0-1 (0.5)")
    add("--limit", type=int, help="predict only on the first LIMIT images")
    add("--tta", action="store_true", help="use test-time augmentation")
    add("--quiet", action="store_true", help="no progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Predict on the images, and print the results and the paths written."""
    from senet_transfer.config import is_classification
    from senet_transfer.engine.inference.classify import classify_images
    from senet_transfer.engine.inference.detect import predict_images
    from senet_transfer.engine.inference.inputs import find_images, load_trained

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, expected 1 or more.")
    images = find_images(args.input)[: args.limit]
    options = [*args.opts, *(("TEST.AUG.ENABLED", "True") if args.tta else ())]
    loaded = load_trained(args.weights, args.config_file, options)
    if not is_classification(loaded.cfg):
        json_file = predict_images(
            loaded, images, args.output, threshold=args.threshold, quiet=args.quiet
        )
        print(f"{len(images)} images: drawings in {args.output}, detections in {json_file}")
        return
    json_file, found = classify_images(loaded, images, args.output, quiet=args.quiet)
    for entry in found:
        top = ", ".join(f"{row['class']} {row['probability']:.1%}" for row in entry["top"])
        print(f"{entry['file_name']}: {top}")
    print(f"{len(images)} images: predictions in {json_file}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
