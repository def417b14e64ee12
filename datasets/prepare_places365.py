#!/usr/bin/env python
"""Turns Places365, as its site serves it, into the shards that training and evaluation read.

    python datasets/prepare_places365.py --source DIR --split val --output datasets/places365/val

DIR holds the lists (`places365_val.txt`, `categories_places365.txt` and so on, or the archive that
they come in) and the images: the archive (`val_256.tar`, `train_256_places365standard.tar`), which
need not be unpacked, or the folder it unpacks to. A run that was stopped goes on where it was.
"""

import argparse
import logging

from senet_transfer.cli.prepare_shards import prepare_shards, shards_parser
from senet_transfer.data.images.places365 import SIZES, SPLITS, open_places365
from senet_transfer.engine.launch import run_single


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = shards_parser(
        "Converts Places365 to WebDataset shards.", source="folder with lists and images"
    )
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--size", choices=SIZES, default="256", help="of the images")
    return parser


def main(args: argparse.Namespace) -> None:
    """Converts, and verifies where that is asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images = open_places365(args.source, args.split, args.size, skip_missing=args.skip_broken)
    prepare_shards(images, args.split, args)


if __name__ == "__main__":
    run_single(main, parser().parse_args())
