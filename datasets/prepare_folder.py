#!/usr/bin/env python
"""Turns a tree of images, one folder a class, into the shards that training and evaluation read.

    python datasets/prepare_folder.py --source flowers/train --output datasets/flowers/train
    python datasets/prepare_folder.py --source flowers/val --output datasets/flowers/val \\
        --classes-from datasets/flowers/train

A few thousand images need no shards: training and evaluation read such a tree as it is. A run that
was stopped goes on where it was.
"""

import argparse
import logging
from pathlib import Path

from senet_transfer.cli.prepare_shards import prepare_shards, shards_parser
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.shards.manifest import load_manifest
from senet_transfer.engine.launch import run_single


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = shards_parser(
        "Converts a folder-a-class tree to WebDataset shards.",
        source="folder with a folder a class",
    )
    parser.add_argument("--name", default="images", help="begins the shards' names")
    parser.add_argument("--classes-from", type=Path, help="shards whose classes and labels to take")
    return parser


def main(args: argparse.Namespace) -> None:
    """Converts, and verifies where that is asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    like = load_manifest(str(args.classes_from)) if args.classes_from else None
    images = open_folder(args.source, like.classes if like else None, skip_empty=args.skip_broken)
    prepare_shards(images, args.name, args)


if __name__ == "__main__":
    run_single(main, parser().parse_args())
