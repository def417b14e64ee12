#!/usr/bin/env python
"""Renders the shapes data set, the small detection problem that `make demo` trains on.

Some of its shapes are also cut out, a folder a class, for the instant twins of classifiers.

    python datasets/prepare_shapes.py

Takes some seconds on one core. A second run finds the data set and does nothing.
"""

import argparse
import logging
import os
from pathlib import Path

from senet_transfer.data.shapes.class_folders import make_shape_classes
from senet_transfer.data.shapes.generate import make_shapes
from senet_transfer.engine.launch import run_single


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    parser = argparse.ArgumentParser(
        description="Renders the shapes data set, in COCO's format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=root / "shapes", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images")
    parser.add_argument("--train", type=int, default=400, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of validation images")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(args: argparse.Namespace) -> None:
    """Renders what is not there yet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shapes = make_shapes(
        args.output, seed=args.seed, train=args.train, val=args.val, quiet=args.quiet
    )
    make_shape_classes(shapes, shapes.with_name(f"{shapes.name}_classes"))


if __name__ == "__main__":
    run_single(main, parser().parse_args())
