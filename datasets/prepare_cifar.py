#!/usr/bin/env python
"""Makes the two files that training on CIFAR-10 or CIFAR-100 reads.

    python datasets/prepare_cifar.py --source cifar-10-python.tar.gz --output datasets/cifar10

The source is an official archive (binary or python version, checked against its site's md5), the
folder it was unpacked into, or a folder with train and test (or train.tar.xz and test.tar.xz) that
have a folder of 32x32 images a class. Takes less than a minute; what is there already is kept.
"""

import argparse
import logging
from pathlib import Path

from senet_transfer.data.cifar.prepare import prepare_cifar
from senet_transfer.engine.launch import run_single


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prepares CIFAR-10, CIFAR-100 or the like.")
    parser.add_argument("--source", type=Path, required=True, help="archive or folder to read")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, such as datasets/cifar10"
    )
    parser.add_argument(
        "--any-checksum",
        action="store_true",
        help="takes an archive in the official form that is not the official one",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(args: argparse.Namespace) -> None:
    """Prepares what is not there yet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_cifar(args.source, args.output, verify=not args.any_checksum, quiet=args.quiet)


if __name__ == "__main__":
    run_single(main, parser().parse_args())
