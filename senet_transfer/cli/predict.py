"""Predicts on images, with a checkpoint of a run.

A detector's objects are drawn on the images and written as a JSON in COCO's format. Of a
classifier the best five classes of each image are printed and written as a JSON.
"""

import argparse

from senet_transfer.cli.arguments import Parser
from senet_transfer.config import is_classification
from senet_transfer.engine.classify import classify_images
from senet_transfer.engine.launch import run_single
from senet_transfer.engine.predictor import find_images, load_trained, predict_images
from senet_transfer.engine.run_checks import check_augmentation
from senet_transfer.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", required=True, help="a checkpoint of a trained model")
    parser.add_argument(
        "--config-file", default="", help="its config; default: the config.yaml beside it"
    )
    parser.add_argument(
        "--input", nargs="+", required=True, help="images, folders of images, or patterns"
    )
    parser.add_argument("--output", required=True, help="folder for the drawings and the JSON")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score, 0-1")
    parser.add_argument("--limit", type=int, help="take the first N images alone")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def _predict(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, expected 1 or more.")
    options = [*args.opts, *(("TEST.AUG.ENABLED", "True") if args.tta else ())]
    cfg = load_trained(args.weights, args.config_file, options)
    check_augmentation(cfg)
    images = find_images(args.input)[: args.limit]
    if is_classification(cfg):
        json_file, found = classify_images(cfg, images, args.output, quiet=args.quiet)
        for entry in found:
            top = ", ".join(f"{row['class']} {row['probability']:.1%}" for row in entry["top"])
            print(f"{entry['file_name']}: {top}")
        print(f"{len(images)} images: predictions in {json_file}")
        return
    json_file = predict_images(cfg, images, args.output, threshold=args.threshold, quiet=args.quiet)
    print(f"{len(images)} images: drawings in {args.output}, detections in {json_file}")


def command() -> None:
    """Runs as the command line says."""
    run_single(_predict, _parser().parse_args())
