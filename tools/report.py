#!/usr/bin/env python
"""Make one HTML page of runs; see --help for examples."""

from senet_transfer.cli.report import command

if __name__ == "__main__":
    command()
