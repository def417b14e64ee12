#!/usr/bin/env python
"""Write an HTML report of training runs; see --help for examples."""

from senet_transfer.cli.report import command

if __name__ == "__main__":
    command()
