"""Commands that prepare CIFAR, render a synthetic dataset, and convert images to shards."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from senet_transfer.cli.arguments import (
    CIFAR_DOWNLOADS,
    IMAGENET_SPLITS,
    PLACES365_SIZES,
    PLACES365_SPLITS,
)
from senet_transfer.errors import UserError
from senet_transfer.utils.text import counted

if TYPE_CHECKING:
    from senet_transfer.data.images.listing import Images


def places365_parser() -> argparse.ArgumentParser:
    parser = _shards_parser(
        "Convert Places365 to WebDataset shards.", source="folder with the lists and images"
    )
    parser.add_argument("--split", choices=PLACES365_SPLITS, required=True, help="split to convert")
    parser.add_argument(
        "--size",
        choices=PLACES365_SIZES,
        default="256",
        help="image version, as in the archive names: 256 (256x256 pixels) or large (default: 256)",
    )
    return parser


def run_places365(args: argparse.Namespace) -> None:
    from senet_transfer.data.images.places365 import open_places365

    images = open_places365(args.source, args.split, args.size, skip_missing=args.skip_broken)
    _write_shards(images, args.split, args)


def imagenet_parser() -> argparse.ArgumentParser:
    parser = _shards_parser(
        "Convert ImageNet (ILSVRC 2012) to WebDataset shards.",
        source="folder with the archives and development kit, or with the folders train and val",
    )
    parser.add_argument("--split", choices=IMAGENET_SPLITS, required=True, help="split to convert")
    parser.add_argument(
        "--exclude",
        metavar="FILE",
        type=Path,
        help="file that lists the images to leave out, one per line: file names, or indices of "
        "validation images (from 1) as in ILSVRC2014_clsloc_validation_blacklist.txt",
    )
    return parser


def run_imagenet(args: argparse.Namespace) -> None:
    from senet_transfer.data.images.imagenet import open_imagenet

    images = open_imagenet(
        args.source, args.split, exclude=args.exclude, skip_missing=args.skip_broken
    )
    _write_shards(images, args.split, args)


def folder_parser() -> argparse.ArgumentParser:
    parser = _shards_parser(
        "Convert labelled images to WebDataset shards.",
        source="folder with one folder per class, or CSV file with the columns path and label",
    )
    parser.add_argument(
        "--name", default="images", help="prefix for the shard names (default: images)"
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--classes-from",
        type=Path,
        help="folder of existing shards, such as the training shards, whose class list is used",
    )
    order.add_argument(
        "--classes",
        metavar="numeric|FILE",
        help="order of the classes: numeric (class folders sorted as numbers) or a file "
        "with one class name per line; default: sorted by name",
    )
    return parser


def run_folder(args: argparse.Namespace) -> None:
    from senet_transfer.data.images.folders import choose_classes, open_images
    from senet_transfer.data.shards.manifest import load_manifest

    classes = choose_classes(args.classes, args.source) if args.classes else None
    if args.classes_from:
        classes = load_manifest(str(args.classes_from)).classes
    images = open_images(args.source, classes, skip_empty=args.skip_broken)
    _write_shards(images, args.name, args)


def manifest_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write manifest.json and index files next to shards that another tool has "
        "written in WebDataset format. The shards can also be used without these files, but then "
        "the samples are counted each time the dataset is opened."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder with .tar files")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="file with one class name per line; default: the label numbers are used as names",
    )
    return parser


def run_manifest(args: argparse.Namespace) -> None:
    from senet_transfer.data.images.class_names import read_class_list
    from senet_transfer.data.shards.scan import write_manifest

    classes = read_class_list(args.classes) if args.classes else None
    manifest = write_manifest(args.folder, classes)
    shards = counted(len(manifest.shards), "shard")
    print(f"{args.folder}: {counted(manifest.samples, 'image')} in {shards}")


def cifar_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Prepare CIFAR-10, CIFAR-100 or similar data.")
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--source", type=Path, help="archive or folder to read")
    data.add_argument(
        "--download", choices=CIFAR_DOWNLOADS, help="download the official archive with torchvision"
    )
    add(
        "--output",
        type=Path,
        help="output folder, such as datasets/cifar10; default with --download: "
        "$DETECTRON2_DATASETS/cifar10 or cifar100",
    )
    add(
        "--any-checksum",
        action="store_true",
        help="accept data in the official layout with a different checksum or number of images",
    )
    add("--quiet", action="store_true", help="hide the progress bars")
    return parser


def run_cifar(args: argparse.Namespace) -> None:
    from senet_transfer.data.cifar.archives import download_cifar
    from senet_transfer.data.cifar.prepare import prepare_cifar

    source, output = args.source, args.output
    if output is None:
        if source is not None:
            raise UserError(
                "--source requires --output. Pass an output folder, such as "
                "--output datasets/cifar10."
            )
        output = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), args.download)
    if source is None:
        source = download_cifar(args.download, output.expanduser())
    prepare_cifar(source, output, verify=not args.any_checksum, quiet=args.quiet)


def shapes_parser() -> argparse.ArgumentParser:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    parser = argparse.ArgumentParser(
        description="Render the synthetic shapes dataset in COCO format."
    )
    add = parser.add_argument
    add("--output", type=Path, default=root / "shapes", help="output folder (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed for the random images (default: 0)")
    add("--train", type=int, default=400, help="number of training images (default: 400)")
    add("--val", type=int, default=100, help="number of validation images (default: 100)")
    add("--quiet", action="store_true", help="hide the progress bar")
    return parser


def run_shapes(args: argparse.Namespace) -> None:
    from senet_transfer.data.shapes.class_folders import make_shape_classes
    from senet_transfer.data.shapes.generate import make_shapes

    shapes = make_shapes(
        args.output, seed=args.seed, train=args.train, val=args.val, quiet=args.quiet
    )
    make_shape_classes(shapes, shapes.with_name(f"{shapes.name}_classes"))


def _shards_parser(description: str, *, source: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments shared by all commands that write shards."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--source", type=Path, required=True, help=source)
    add("--output", type=Path, required=True, help="output folder for the shards of this split")
    add("--seed", type=int, default=0, help="seed for the global shuffle (default: 0)")
    add("--workers", type=int, default=2, help="number of processes (default: 2)")
    add("--shard-mb", type=float, default=200, help="approximate shard size in MB (default: 200)")
    add(
        "--skip-broken",
        type=int,
        default=0,
        help="maximum number of unreadable images to skip and record (default: 0)",
    )
    add("--verify", action="store_true", help="read and verify all written shards")
    add("--quiet", action="store_true", help="hide the progress bars")
    return parser


def _write_shards(images: "Images", split: str, args: argparse.Namespace) -> None:
    """Write images to shards.

    Args:
        images: The images to write.
        split: The prefix for the shard names.
        args: The arguments parsed by :func:`_shards_parser`.
    """
    from senet_transfer.data.shards.verify import verify
    from senet_transfer.data.shards.write import convert

    manifest = convert(
        images,
        args.output,
        split=split,
        seed=args.seed,
        shard_mb=args.shard_mb,
        workers=args.workers,
        skip_broken=args.skip_broken,
        quiet=args.quiet,
    )
    shards = counted(len(manifest.shards), "shard")
    print(f"{args.output}: {counted(manifest.samples, 'image')} in {shards}")
    if manifest.skipped:
        print(
            f"skipped {counted(len(manifest.skipped), 'unreadable image')}, listed in manifest.json"
        )
    if args.verify:
        verify(args.output, workers=args.workers, quiet=args.quiet)
