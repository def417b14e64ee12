"""Print a shell script that completes the commands and options of senet.

    senet completion bash > ~/.local/share/bash-completion/completions/senet
    senet completion zsh > ~/.zfunc/_senet

For zsh, the folder must be in $fpath.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import shtab

from senet_transfer.utils.private_api import parser_arguments

# Arguments of type str that are completed with file names.
_FILES = ("config_file", "weights", "input", "output", "image", "classes", "data")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell")
    return parser


def tree() -> argparse.ArgumentParser:
    """Return a parser for the ``senet`` command, with one subparser per subcommand."""
    from senet_transfer.cli.data import PREPARATIONS
    from senet_transfer.cli.main import COMMANDS

    program = argparse.ArgumentParser(prog="senet")
    program.add_argument("--version", action="store_true", help="print the version")
    commands = program.add_subparsers().add_parser
    for name, (module, text) in COMMANDS.items():
        if name == "data":
            names = commands(name, help=text).add_subparsers().add_parser
            for kind, preparation in PREPARATIONS.items():
                _add(names, kind, preparation.parser(), kind)
        else:
            own = importlib.import_module(f"senet_transfer.cli.{module}").parser()
            _add(commands, name, own, text)
    return program


def _add(
    add_parser: Callable[..., argparse.ArgumentParser],
    name: str,
    own: argparse.ArgumentParser,
    text: str,
) -> None:
    """Add a command's parser, with file name completion for its file arguments."""
    added = add_parser(name, help=text, parents=[own], add_help=False)
    for argument in parser_arguments(added):
        if argument.type is Path or (argument.dest in _FILES and argument.nargs != 0):
            argument.complete = shtab.FILE  # read by shtab


def command(words: list[str] | None = None) -> None:
    """Parse the arguments, and print the shell completion script."""
    print(shtab.complete(tree(), parser().parse_args(words).shell))
