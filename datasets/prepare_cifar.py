#!/usr/bin/env python
"""Prepare the two files from which CIFAR-10, CIFAR-100 or similar data is trained.

    python datasets/prepare_cifar.py --download cifar10
    python datasets/prepare_cifar.py --source cifar-10-python.tar.gz --output datasets/cifar10

The download is torchvision's, verified by its md5. A source is an official archive (binary or
python version, verified by its md5), the folder it was unpacked to, or a folder with train and test
(or train.tar.xz and test.tar.xz) that hold one folder of 32x32 images per class. Preparing takes
less than a minute; existing files are kept.
"""

import argparse
import logging
import os
from pathlib import Path

from senet_transfer.data.cifar.archives import DOWNLOADS, download_cifar
from senet_transfer.data.cifar.prepare import prepare_cifar
from senet_transfer.engine.launch import run_single
from senet_transfer.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Prepare CIFAR-10, CIFAR-100 or similar data.")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--source", type=Path, help="archive or folder to read")
    data.add_argument(
        "--download", choices=DOWNLOADS, help="download the official archive to the output folder"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write, such as datasets/cifar10; with --download the default is "
        "$DETECTRON2_DATASETS/cifar10 or cifar100",
    )
    parser.add_argument(
        "--any-checksum",
        action="store_true",
        help="accept data in the official form with other checksums or numbers of images",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars while reading")
    return parser


def main(args: argparse.Namespace) -> None:
    """Prepare the data, downloaded or from a source."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source, output = args.source, args.output
    if output is None:
        if source is not None:
            raise UserError("--source needs --output, a folder to write such as datasets/cifar10.")
        output = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), args.download)
    if source is None:
        source = download_cifar(args.download, output.expanduser())
    prepare_cifar(source, output, verify=not args.any_checksum, quiet=args.quiet)


if __name__ == "__main__":
    run_single(main, parser().parse_args())
