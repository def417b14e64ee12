"""Run a trained detector or classifier on images.

A detector's detections are drawn on the images and written to a JSON file in COCO format. For a
classifier, the five most probable classes of each image are printed and written to a JSON file.
"""

import argparse

from senet_transfer.cli.arguments import Parser, run_command
from senet_transfer.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="a trained model's checkpoint")
    add("--config-file", default="", help="default: the config.yaml next to the weights")
    add("--input", nargs="+", required=True, help="image files, folders or patterns")
    add("--output", required=True, help="output folder for the drawings and the JSON file")
    add("--threshold", type=float, default=0.5, help="minimum score, between 0 and 1 (0.5)")
    add("--limit", type=int, help="use only the first LIMIT images")
    add("--tta", action="store_true", help="use test-time augmentation")
    add("--quiet", action="store_true", help="no progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the model on the images, and print the results and the paths of the files."""
    from senet_transfer.config import is_classification
    from senet_transfer.engine.inference.classify import classify_images
    from senet_transfer.engine.inference.detect import predict_images
    from senet_transfer.engine.inference.inputs import find_images, load_trained

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; expected 1 or more.")
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
