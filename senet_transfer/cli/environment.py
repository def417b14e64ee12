"""Print package versions, hardware and compilers for a bug report."""

import argparse

from senet_transfer.cli.arguments import run_command


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    return argparse.ArgumentParser(description=__doc__)


def main(args: argparse.Namespace) -> None:
    """Print package versions, hardware and compilers for a bug report."""
    from senet_transfer.utils.environment import environment_report

    print(environment_report(), end="")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
