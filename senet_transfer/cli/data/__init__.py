"""``senet data``: preparing and checking data sets for training and evaluation."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass

from senet_transfer.cli.arguments import run_command
from senet_transfer.cli.data import own_data, preparation


@dataclass(frozen=True)
class Preparation:
    """Argument parser and main function for preparing, checking or showing a data set."""

    parser: Callable[[], argparse.ArgumentParser]
    main: Callable[[argparse.Namespace], None]


PREPARATIONS = {
    "check": Preparation(own_data.check_parser, own_data.run_check),
    "cifar": Preparation(preparation.cifar_parser, preparation.run_cifar),
    "folder": Preparation(preparation.folder_parser, preparation.run_folder),
    "imagenet": Preparation(preparation.imagenet_parser, preparation.run_imagenet),
    "import": Preparation(own_data.import_parser, own_data.run_import),
    "manifest": Preparation(preparation.manifest_parser, preparation.run_manifest),
    "places365": Preparation(preparation.places365_parser, preparation.run_places365),
    "shapes": Preparation(preparation.shapes_parser, preparation.run_shapes),
    "show": Preparation(own_data.show_parser, own_data.run_show),
    "split": Preparation(own_data.split_parser, own_data.run_split),
}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser; each data set has a separate parser for its options."""
    parser = argparse.ArgumentParser(
        description="Prepare, check or show a data set. To list the options for NAME, use NAME "
        "--help."
    )
    parser.add_argument("name", metavar="NAME", choices=PREPARATIONS, help=", ".join(PREPARATIONS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options for the data set")
    return parser


def prepare(name: str, words: list[str] | None = None) -> None:
    """Parse the arguments for a data set, and prepare, check or show it.

    Args:
        name: One of :data:`PREPARATIONS`.
        words: The arguments after ``senet data NAME``. If None, the script's arguments are used.
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
