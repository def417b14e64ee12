"""``senet train``: train or evaluate a model from a config."""

import argparse

from senet_transfer.cli.arguments import argument_parser as parser
from senet_transfer.utils.import_hook import without_script_warnings

__all__ = ["command", "parser"]


def command(words: list[str] | None = None) -> None:
    """Run as the command line says."""
    args: argparse.Namespace = parser().parse_args(words)
    # Imported only now: --help and mistakes in the arguments need neither torch nor Detectron2.
    with without_script_warnings():
        from senet_transfer.engine.launch import run
        from senet_transfer.engine.train import main

    run(main, args)


if __name__ == "__main__":
    command()
