#!/usr/bin/env python
"""Train with several seeds; see --help for examples."""

from senet_transfer.cli.analysis.sweep import command

if __name__ == "__main__":
    command()
