"""Create an HTML report on training runs.

The report shows the results next to those in the paper, training curves, images and configs.

    senet report output/demo
    senet report output/demo output/other --output compared.html

A RUN is the output folder of a finished or unfinished run of `senet train`, or a folder that
contains such folders. The report is a single file that can be viewed offline in any browser.
"""

import argparse
from pathlib import Path

from senet_transfer.cli.arguments import run_command
from senet_transfer.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's output folder, or a folder that contains runs",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="HTML file to write; default: report.html in the run's folder, or in the parent "
        "folder of the first run if there are several",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=240,
        help="maximum number of images in a report on detectors; reports on classifiers show up to "
        "four times as many (default: 240)",
    )
    parser.add_argument("--quiet", action="store_true", help="hide the progress bars")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the report and print its path."""
    from senet_transfer.analysis.report import find_runs, load_runs, write_report

    if args.images < 0:
        raise UserError(f"--images is {args.images}; expected 0 or more.")
    folders = find_runs(args.runs)
    place = folders[0] if len(folders) == 1 else folders[0].resolve().parent
    output = args.output or place / "report.html"
    write_report(load_runs(folders), output, images=args.images, quiet=args.quiet)
    print(f"{len(folders)} runs: {output}" if len(folders) > 1 else output)


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
