#!/usr/bin/env python
"""Count a model's parameters and multiply-accumulates; see --help for examples."""

from senet_transfer.cli.analysis.complexity import command

if __name__ == "__main__":
    command()
