#!/usr/bin/env python
"""Convert a weight file to another format; see --help for examples."""

from senet_transfer.cli.convert import command

if __name__ == "__main__":
    command()
