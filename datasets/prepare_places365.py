#!/usr/bin/env python
"""Turns Places365, as its site serves it, into the shards that training and evaluation read.

    python datasets/prepare_places365.py --source DIR --split val --output datasets/places365/val

DIR holds the lists (`places365_val.txt`, `categories_places365.txt` and so on, or the archive that
they come in) and the images: the archive (`val_256.tar`, `train_256_places365standard.tar`), which
need not be unpacked, or the folder it unpacks to. A run that was stopped goes on where it was.
"""

import argparse
import logging
from pathlib import Path

from senet_transfer.data.convert import convert
from senet_transfer.data.places365 import SIZES, SPLITS, open_places365
from senet_transfer.data.verify import verify
from senet_transfer.engine.launch import run_single


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Converts Places365 to WebDataset shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with lists and images")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for this split's shards")
    parser.add_argument("--size", choices=SIZES, default="256", help="of the images")
    parser.add_argument("--seed", type=int, default=0, help="of the global shuffle")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--shard-mb", type=float, default=200, help="about the size of a shard")
    parser.add_argument(
        "--skip-broken", type=int, default=0, help="leave out and record this many bad images"
    )
    parser.add_argument("--verify", action="store_true", help="read all back and compare, after")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(args: argparse.Namespace) -> None:
    """Converts, and verifies where that is asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images = open_places365(args.source, args.split, args.size, skip_missing=args.skip_broken)
    manifest = convert(
        images,
        args.output,
        split=args.split,
        seed=args.seed,
        shard_mb=args.shard_mb,
        workers=args.workers,
        skip_broken=args.skip_broken,
        quiet=args.quiet,
    )
    print(f"{args.output}: {manifest.samples} images in {len(manifest.shards)} shards")
    if manifest.skipped:
        print(f"left out {len(manifest.skipped)} bad images; manifest.json names them")
    if args.verify:
        verify(args.output, workers=args.workers, quiet=args.quiet)


if __name__ == "__main__":
    run_single(main, parser().parse_args())
