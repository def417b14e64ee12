"""``senet data``: preparation and checks of data sets for training and evaluation."""

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senet_transfer.cli.arguments import (
    CIFAR_DOWNLOADS,
    DETECTION_FORMATS,
    PLACES365_SIZES,
    PLACES365_SPLITS,
    Parser,
    add_dataset_argument,
    run_command,
)
from senet_transfer.errors import UserError

if TYPE_CHECKING:
    from senet_transfer.data.images.listing import Images


def _places365_parser() -> argparse.ArgumentParser:
    parser = _shards_parser(
        "Convert Places365 to WebDataset shards.", source="folder with the lists and images"
    )
    parser.add_argument("--split", choices=PLACES365_SPLITS, required=True)
    parser.add_argument("--size", choices=PLACES365_SIZES, default="256", help="image size")
    return parser


def _prepare_places365(args: argparse.Namespace) -> None:
    from senet_transfer.data.images.places365 import open_places365

    images = open_places365(args.source, args.split, args.size, skip_missing=args.skip_broken)
    _write_shards(images, args.split, args)


def _folder_parser() -> argparse.ArgumentParser:
    parser = _shards_parser(
        "Convert labelled images to WebDataset shards.",
        source="folder with one folder per class, or CSV file with the columns path and label",
    )
    parser.add_argument("--name", default="images", help="prefix for the shard names")
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--classes-from", type=Path, help="existing shards from which to copy classes and labels"
    )
    order.add_argument(
        "--classes",
        metavar="numeric|FILE",
        help="order of the labels: class folders sorted as numbers, or a file with one class name "
        "per line; default: sorted by name",
    )
    return parser


def _prepare_folder(args: argparse.Namespace) -> None:
    from senet_transfer.data.images.folders import choose_classes, open_images
    from senet_transfer.data.shards.manifest import load_manifest

    classes = choose_classes(args.classes, args.source) if args.classes else None
    if args.classes_from:
        classes = load_manifest(str(args.classes_from)).classes
    images = open_images(args.source, classes, skip_empty=args.skip_broken)
    _write_shards(images, args.name, args)


def _manifest_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write manifest.json and indices next to shards that another program has "
        "written in webdataset's layout. Such shards are usable without them, but are then counted "
        "at each start."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder with .tar files")
    parser.add_argument(
        "--classes", metavar="FILE", help="file with one class name per line; default: numbers"
    )
    return parser


def _write_manifest(args: argparse.Namespace) -> None:
    from senet_transfer.data.images.class_names import read_class_list
    from senet_transfer.data.shards.scan import write_manifest

    classes = read_class_list(args.classes) if args.classes else None
    manifest = write_manifest(args.folder, classes)
    print(f"{args.folder}: {manifest.samples} images in {len(manifest.shards)} shards")


def _cifar_parser() -> argparse.ArgumentParser:
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
    add("--quiet", action="store_true", help="no progress bars while reading")
    return parser


def _prepare_cifar(args: argparse.Namespace) -> None:
    from senet_transfer.data.cifar.archives import download_cifar
    from senet_transfer.data.cifar.prepare import prepare_cifar

    source, output = args.source, args.output
    if output is None:
        if source is not None:
            raise UserError(
                "--source requires --output. Give the output folder, such as datasets/cifar10."
            )
        output = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), args.download)
    if source is None:
        source = download_cifar(args.download, output.expanduser())
    prepare_cifar(source, output, verify=not args.any_checksum, quiet=args.quiet)


def _shapes_parser() -> argparse.ArgumentParser:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    parser = argparse.ArgumentParser(
        description="Render the shapes data set in COCO format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=root / "shapes", help="output folder")
    add("--seed", type=int, default=0, help="seed for the random images")
    add("--train", type=int, default=400, help="number of training images")
    add("--val", type=int, default=100, help="number of validation images")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _prepare_shapes(args: argparse.Namespace) -> None:
    from senet_transfer.data.shapes.class_folders import make_shape_classes
    from senet_transfer.data.shapes.generate import make_shapes

    shapes = make_shapes(
        args.output, seed=args.seed, train=args.train, val=args.val, quiet=args.quiet
    )
    make_shape_classes(shapes, shapes.with_name(f"{shapes.name}_classes"))


def _check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check detection data: the annotations, and all images by reading them "
        "completely."
    )
    add = parser.add_argument
    add(
        "json_file",
        metavar="PATH",
        help="annotations: a JSON file in COCO's format, or a file or folder in another supported "
        "format, followed by the split if there are several (data.yaml:train)",
    )
    add(
        "images",
        metavar="FOLDER",
        nargs="?",
        help="folder to which its file_names are relative; default: the format's usual folder",
    )
    add("--masks", action="store_true", help="check the outlines that instance masks require")
    add("--headers-only", action="store_true", help="read only the sizes of the images")
    add(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(),
        help="INPUT.VALUE_RANGE, for images with 16 or 32 bits per channel",
    )
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _check(args: argparse.Namespace) -> None:
    from senet_transfer.data.detection.coco import (
        CocoDataset,
        register_coco_dataset,
        registered_entry,
    )
    from senet_transfer.data.detection.dataset_checks import check_outlines, check_trainable
    from senet_transfer.data.detection.image_checks import check_dataset_images

    name = os.path.basename(args.json_file)
    register_coco_dataset(name, args.json_file, args.images, outlines=args.masks)
    dataset = registered_entry(name)
    assert isinstance(dataset, CocoDataset)
    check_trainable([name])
    if args.masks:
        check_outlines([name])
    mode = "header" if args.headers_only else "decode"
    count = check_dataset_images(dataset, mode=mode, value_range=args.value_range, quiet=args.quiet)
    print(f"{args.json_file}: no errors in the annotations and {count} images")


def _split_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Split a data set into training, validation and test data with equal fractions "
        "of each class. One file per part is written; the images stay where they are."
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="JSON file in COCO's format, CSV file with the columns path and label, or folder with "
        "one folder per class",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    _add_split_arguments(parser)
    return parser


def _add_split_arguments(parser: argparse.ArgumentParser, val: float | None = 0.2) -> None:
    add = parser.add_argument
    parts = parser.add_mutually_exclusive_group()
    shown = "no split" if val is None else val
    parts.add_argument(
        "--val", type=float, default=val, help=f"fraction of images in val ({shown})"
    )
    parts.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="write K pairs of train and val for cross-validation: each image is in one val",
    )
    add("--test", type=float, default=0.0, help="fraction of images in test (0)")
    add("--seed", type=int, default=0, help="seed for the random split (0)")
    add(
        "--group-by",
        default="",
        metavar="PATTERN",
        help="keep images together, such as the frames of a video: regular expression of a part of "
        "their file names whose first group, or match if it has no groups, is the same",
    )


def _split(args: argparse.Namespace) -> None:
    from senet_transfer.data.split_files import split_data
    from senet_transfer.data.splits import Split

    split = Split(args.val, args.test, args.folds, args.seed, args.group_by)
    print(split_data(args.source, args.output, split))


def _import_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert annotations for detection to JSON files in COCO's format: train.json, "
        "and val.json and test.json if the data set states these splits or --val is given. The "
        "images are not copied."
    )
    add = parser.add_argument
    add("--from", dest="format", choices=DETECTION_FORMATS, required=True, help="format to read")
    add(
        "--source",
        type=Path,
        required=True,
        help="folder of the data set, or its file: data.yaml of YOLO, XML of CVAT, JSON of Label "
        "Studio or VIA",
    )
    add("--output", type=Path, required=True, help="folder for the JSON files")
    add("--images", type=Path, help="folder with the images; default: the format's usual folder")
    _add_split_arguments(parser, val=None)
    return parser


def _import(args: argparse.Namespace) -> None:
    from senet_transfer.data.detection.formats.prepare import import_dataset, write_dataset

    datasets, images = import_dataset(args.format, args.source, args.images)
    if args.val is not None or args.folds:
        datasets = _split_import(args, datasets)
    elif args.test or args.group_by:
        raise UserError("--test and --group-by require --val or --folds. Add one of them.")
    summaries = write_dataset(datasets, args.output, images, source=str(args.source))
    for warning in dict.fromkeys(w for summary in summaries.values() for w in summary.warnings):
        logging.warning(warning)
    for split, summary in summaries.items():
        print(
            f"{args.output / split}.json: {summary.num_images} images, "
            f"{summary.num_annotations} objects, {len(summary.classes)} classes"
        )
    options = [
        f"--dataset my_{split} {args.output / split}.json {images}"
        for split in ("train", "val")
        if split in datasets
    ]
    if args.folds:
        options = [f"--folds {args.output} --images {images}"]
    command = "tools/run_seeds.py" if args.folds else "a training command"
    print(f"Options of {command}: {' '.join(options)}")


def _split_import(
    args: argparse.Namespace, datasets: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Split imported data and print the table; raise an error if it is already split."""
    from senet_transfer.data.split_files import split_coco
    from senet_transfer.data.splits import Split

    if len(datasets) > 1:
        raise UserError(
            f"{args.source} already contains the splits {', '.join(datasets)}, which --val and "
            "--folds would mix. Omit these options to keep the splits."
        )
    val = 0.2 if args.val is None else args.val
    split = Split(val, args.test, args.folds, args.seed, args.group_by)
    content = next(iter(datasets.values()))
    datasets, table = split_coco(content, args.source, split)
    print(table)
    return datasets


def _shards_parser(description: str, *, source: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments shared by all commands that write shards."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help=source)
    add("--output", type=Path, required=True, help="output folder for the shards of this split")
    add("--seed", type=int, default=0, help="seed for the global shuffle")
    add("--workers", type=int, default=2, help="number of processes")
    add("--shard-mb", type=float, default=200, help="approximate shard size in MB")
    add(
        "--skip-broken",
        type=int,
        default=0,
        help="maximum number of unreadable images to skip and record",
    )
    add("--verify", action="store_true", help="read all written shards and verify them")
    add("--quiet", action="store_true", help="no progress bars")
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
    print(f"{args.output}: {manifest.samples} images in {len(manifest.shards)} shards")
    if manifest.skipped:
        print(f"skipped {len(manifest.skipped)} unreadable images, listed in manifest.json")
    if args.verify:
        verify(args.output, workers=args.workers, quiet=args.quiet)


def _show_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Write an HTML page on the data of a detector or classifier: training inputs "
        "with augmentation, statistics, duplicates, and unusual annotations."
    )
    add = parser.add_argument
    add(
        "--data",
        default="",
        metavar="PATH",
        help="data as for the option --data of senet train, or the name of a registered data set",
    )
    add("--val", default="", metavar="PATH", help="evaluation data; default: that of --data")
    add(
        "--images",
        default="",
        metavar="FOLDER",
        help="image folder of the annotations; default: it is searched for",
    )
    add_dataset_argument(parser)
    add(
        "--config-file",
        default="",
        metavar="FILE",
        help="a YAML file, or the name of a config; default: finetune_detector for detection data, "
        "finetune_folder for others. Without --data and --dataset, its data sets are used",
    )
    add("--output", type=Path, default=Path("data.html"), help="HTML file (data.html)")
    add("--inputs", type=int, default=12, help="number of training inputs to show (12)")
    add(
        "--limit",
        type=int,
        default=20_000,
        help="maximum number of images per data set that are decoded; of larger data sets, a "
        "random sample is used (20000)",
    )
    add("--workers", type=int, default=2, help="number of processes that decode images (2)")
    add("--quiet", action="store_true", help="no progress bars")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def _show(args: argparse.Namespace) -> None:
    from senet_transfer.analysis.dataset_page import data_config, write_data_page

    for key in ("inputs", "limit", "workers"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} is {getattr(args, key)}; expected 1 or more.")
    logging.getLogger().setLevel(logging.WARNING)
    cfg = data_config(
        args.data,
        val=args.val,
        images=args.images,
        datasets=[list(filter(None, words)) for words in args.dataset],
        config_file=args.config_file,
        options=args.opts,
    )
    write_data_page(
        cfg,
        args.output,
        inputs=args.inputs,
        limit=args.limit,
        workers=args.workers,
        quiet=args.quiet,
    )
    print(args.output)


@dataclass(frozen=True)
class Preparation:
    """Argument parser and main function for preparing, checking or showing a data set."""

    parser: Callable[[], argparse.ArgumentParser]
    main: Callable[[argparse.Namespace], None]


PREPARATIONS = {
    "check": Preparation(_check_parser, _check),
    "cifar": Preparation(_cifar_parser, _prepare_cifar),
    "folder": Preparation(_folder_parser, _prepare_folder),
    "import": Preparation(_import_parser, _import),
    "manifest": Preparation(_manifest_parser, _write_manifest),
    "places365": Preparation(_places365_parser, _prepare_places365),
    "shapes": Preparation(_shapes_parser, _prepare_shapes),
    "show": Preparation(_show_parser, _show),
    "split": Preparation(_split_parser, _split),
}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser; each data set has a separate parser for its options."""
    parser = argparse.ArgumentParser(
        description="Prepare, check or show a data set. To show its options, use NAME --help."
    )
    parser.add_argument("name", metavar="NAME", choices=PREPARATIONS, help=", ".join(PREPARATIONS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options for the data set")
    return parser


def prepare(name: str, words: list[str] | None = None) -> None:
    """Parse the arguments for a data set, and prepare, check or show it.

    Args:
        name: One of :data:`PREPARATIONS`.
        words: The arguments after ``senet data NAME``. If None, those of the script are used.
    """
    preparation = PREPARATIONS[name]
    own = preparation.parser()
    if words is not None:
        own.prog = f"{own.prog} {name}"
    args = own.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(preparation.main, args)


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    args = parser().parse_args(words)
    prepare(args.name, args.options)
