"""``senet data``: preparing and checking datasets for training and evaluation."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass

from senet_transfer.cli.arguments import described, run_command
from senet_transfer.cli.data import own_data, preparation


@dataclass(frozen=True)
class Preparation:
    """Command for preparing, checking or showing a dataset.

    Attributes:
        text: Description for the help text.
        parser: Function that returns the argument parser.
        main: Main function, which takes the parsed arguments.
    """

    text: str
    parser: Callable[[], argparse.ArgumentParser]
    main: Callable[[argparse.Namespace], None]


PREPARATIONS = {
    "check": Preparation("check detection data", own_data.check_parser, own_data.run_check),
    "cifar": Preparation(
        "prepare CIFAR-10 or CIFAR-100", preparation.cifar_parser, preparation.run_cifar
    ),
    "folder": Preparation(
        "convert labelled images to shards", preparation.folder_parser, preparation.run_folder
    ),
    "imagenet": Preparation(
        "convert ImageNet to shards", preparation.imagenet_parser, preparation.run_imagenet
    ),
    "import": Preparation(
        "convert annotations to COCO format", own_data.import_parser, own_data.run_import
    ),
    "manifest": Preparation(
        "write a manifest for existing shards",
        preparation.manifest_parser,
        preparation.run_manifest,
    ),
    "places365": Preparation(
        "convert Places365 to shards", preparation.places365_parser, preparation.run_places365
    ),
    "shapes": Preparation(
        "render the synthetic shapes dataset", preparation.shapes_parser, preparation.run_shapes
    ),
    "show": Preparation(
        "write an HTML page about a dataset", own_data.show_parser, own_data.run_show
    ),
    "split": Preparation(
        "split data into train, val and test, or into folds",
        own_data.split_parser,
        own_data.run_split,
    ),
}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser; each subcommand has a separate parser."""
    listed = described({name: each.text for name, each in PREPARATIONS.items()})
    parser = argparse.ArgumentParser(
        description="Prepare, check or show a dataset. To list the options of a command, use "
        "`senet data NAME --help`.",
        epilog=f"names:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=PREPARATIONS, help="a command listed below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options for NAME")
    return parser


def prepare(name: str, words: list[str] | None = None) -> None:
    """Parse the command-line arguments, and prepare, check or show a dataset.

    Args:
        name: A key of :data:`PREPARATIONS`.
        words: The arguments after ``senet data NAME``. If None, ``sys.argv`` is used.
    """
    chosen = PREPARATIONS[name]
    own = chosen.parser()
    if words is not None:
        own.prog = f"{own.prog} {name}"
    args = own.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(chosen.main, args)


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    args = parser().parse_args(words)
    prepare(args.name, args.options)
