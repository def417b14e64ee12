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

from senet_transfer.data.convert import convert
from senet_transfer.data.folder import open_folder
from senet_transfer.data.manifest import load_manifest
from senet_transfer.data.verify import verify
from senet_transfer.engine.launch import run_single


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Converts a folder-a-class tree to WebDataset shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with a folder a class")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--name", default="images", help="begins the shards' names")
    parser.add_argument("--classes-from", type=Path, help="shards whose classes and labels to take")
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
    like = load_manifest(str(args.classes_from)) if args.classes_from else None
    images = open_folder(args.source, like.classes if like else None, skip_empty=args.skip_broken)
    manifest = convert(
        images,
        args.output,
        split=args.name,
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
