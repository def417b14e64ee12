#!/usr/bin/env python
"""Convert a weight file of any family; see --help for examples."""

from senet_transfer.cli.convert import command

if __name__ == "__main__":
    command()
