#!/usr/bin/env python
"""Create an HTML report on training runs; see --help for examples."""

from senet_transfer.cli.analysis.report import command

if __name__ == "__main__":
    command()
