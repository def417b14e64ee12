"""Commands that import, check, split and show a user's own dataset."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from senet_transfer.cli.arguments import DETECTION_FORMATS, Parser, add_dataset_argument
from senet_transfer.errors import UserError
from senet_transfer.utils.text import counted


def check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check detection data: validate the annotations and decode all images."
    )
    add = parser.add_argument
    add(
        "json_file",
        metavar="PATH",
        help="annotations: a JSON file in COCO format, or a file or folder in another supported "
        "format, followed by the split if there are several (data.yaml:train)",
    )
    add(
        "images",
        metavar="FOLDER",
        nargs="?",
        help="image folder, to which file names in the annotations are relative; default: the "
        "folder in which the format usually stores images",
    )
    add("--masks", action="store_true", help="also check the segmentation masks of the objects")
    add(
        "--headers-only",
        action="store_true",
        help="read the image headers without decoding the images",
    )
    add(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(),
        help="value of INPUT.VALUE_RANGE, for images with 16 or 32 bits per channel",
    )
    _add_exif_argument(parser)
    add("--quiet", action="store_true", help="hide the progress bar")
    return parser


def _add_exif_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-exif",
        action="store_true",
        help="the box coordinates refer to the images as stored, before EXIF rotation; for "
        "training, set INPUT.EXIF to ignore",
    )


def run_check(args: argparse.Namespace) -> None:
    from senet_transfer.data.detection.coco import (
        CocoDataset,
        register_coco_dataset,
        registered_entry,
    )
    from senet_transfer.data.detection.dataset_checks import check_segmentations, check_trainable
    from senet_transfer.data.detection.image_checks import check_dataset_images
    from senet_transfer.data.images.decode import Reading

    name = os.path.basename(os.path.abspath(args.json_file))
    reading = Reading(tuple(args.value_range), upright=not args.ignore_exif)
    register_coco_dataset(
        name, args.json_file, args.images, segmentations=args.masks, upright=reading.upright
    )
    dataset = registered_entry(name)
    assert isinstance(dataset, CocoDataset)
    check_trainable([name])
    if args.masks:
        check_segmentations([name])
    mode = "header" if args.headers_only else "decode"
    images = check_dataset_images(dataset, mode=mode, reading=reading, quiet=args.quiet)
    print(f"{args.json_file}: the annotations and {counted(images, 'image')} have no errors")


def split_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Split a dataset into training, validation and test data, stratified by class. "
        "One file per split is written; the images are not moved."
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="JSON file in COCO format, CSV file with the columns path and label, or folder with "
        "one folder per class",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="output folder for the split files"
    )
    _add_split_arguments(parser)
    return parser


def _add_split_arguments(parser: argparse.ArgumentParser, val: float | None = 0.2) -> None:
    add = parser.add_argument
    parts = parser.add_mutually_exclusive_group()
    shown = "no split" if val is None else val
    parts.add_argument(
        "--val",
        type=float,
        default=val,
        help=f"fraction of images in the validation split (default: {shown})",
    )
    parts.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="write K train/val splits for K-fold cross-validation, with disjoint validation sets",
    )
    add("--test", type=float, default=0.0, help="fraction of images in the test split (default: 0)")
    add("--seed", type=int, default=0, help="seed for the random split (default: 0)")
    add(
        "--group-by",
        default="",
        metavar="PATTERN",
        help="keep related images, such as the frames of a video, in the same split. PATTERN is a "
        "regular expression that matches a part of the file names. Images with the same first "
        "group (or, without groups, the same match) stay together",
    )


def run_split(args: argparse.Namespace) -> None:
    from senet_transfer.data.split_files import split_data
    from senet_transfer.data.splits import Split

    split = Split(args.val, args.test, args.folds, args.seed, args.group_by)
    print(split_data(args.source, args.output, split))


def import_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert annotations for detection to COCO format. One JSON file is written "
        "per split of the dataset, such as train.json and val.json. A dataset without splits is "
        "written to train.json, unless it is split with --val and --test, or into folds with "
        "--folds. The images are not copied."
    )
    add = parser.add_argument
    add("--from", dest="format", choices=DETECTION_FORMATS, required=True, help="format to read")
    add(
        "--source",
        type=Path,
        required=True,
        help="folder or file of the dataset, such as YOLO's data.yaml, CVAT's XML file, or the "
        "JSON file of Label Studio or VIA",
    )
    add(
        "--output",
        type=Path,
        required=True,
        help="output folder for the JSON files; must not contain files of an earlier import",
    )
    add(
        "--images",
        type=Path,
        help="image folder; default: the folder in which the format usually stores images",
    )
    _add_exif_argument(parser)
    _add_split_arguments(parser, val=None)
    return parser


def run_import(args: argparse.Namespace) -> None:
    from senet_transfer.data.detection.formats.prepare import import_dataset, write_dataset

    datasets, images = import_dataset(
        args.format, args.source, args.images, upright=not args.ignore_exif
    )
    if args.val is not None or args.folds:
        datasets = _split_import(args, datasets)
    elif args.test or args.group_by:
        raise UserError("--test and --group-by require --val or --folds. Add one of them.")
    summaries = write_dataset(datasets, args.output, images, source=str(args.source))
    for warning in dict.fromkeys(w for summary in summaries.values() for w in summary.warnings):
        logging.warning(warning)
    for split, summary in summaries.items():
        print(
            f"{args.output / split}.json: {counted(summary.num_images, 'image')}, "
            f"{counted(summary.num_annotations, 'object')}, "
            f"{counted(len(summary.classes), 'class', 'classes')}"
        )
    options = [
        f"--dataset my_{split} {args.output / split}.json {images}"
        for split in ("train", "val")
        if split in datasets
    ]
    if args.folds:
        options = [f"--folds {args.output} --images {images}"]
    command = "senet sweep" if args.folds else "a training command"
    print(f"Options for {command}: {' '.join(options)}")


def _split_import(
    args: argparse.Namespace, datasets: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Split an imported dataset and print a table of the splits.

    Raises:
        UserError: If the dataset already defines several splits.
    """
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


def show_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Write an HTML page about the data of a detector or classifier: training "
        "inputs with\naugmentation, statistics, duplicates, and unusual annotations."
    )
    add = parser.add_argument
    add(
        "--data",
        default="",
        metavar="PATH",
        help="data in any form that senet train --data accepts, or the name of a registered "
        "dataset",
    )
    add(
        "--val",
        default="",
        metavar="PATH",
        help="evaluation data; default: the validation data in --data",
    )
    add(
        "--images",
        default="",
        metavar="FOLDER",
        help="image folder for the annotations; default: the folder in which the "
        "annotation format usually stores images",
    )
    add_dataset_argument(parser)
    add(
        "--config-file",
        default="",
        metavar="FILE",
        help="a YAML file, or the name of a config; default: finetune_detector for detection data, "
        "finetune_folder for other data. Without --data and --dataset, the config's datasets "
        "are used",
    )
    add(
        "--output",
        type=Path,
        default=Path("data.html"),
        help="HTML file to write (default: data.html)",
    )
    add("--inputs", type=int, default=12, help="number of training inputs to show (default: 12)")
    add(
        "--limit",
        type=int,
        default=20_000,
        help="maximum number of images to decode per dataset; larger datasets are sampled "
        "randomly (default: 20000)",
    )
    add(
        "--workers", type=int, default=2, help="number of processes that decode images (default: 2)"
    )
    add("--quiet", action="store_true", help="hide the progress bars")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def run_show(args: argparse.Namespace) -> None:
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
