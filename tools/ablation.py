#!/usr/bin/env python
"""Train the variants of SE in the paper's ablations; see --help for examples."""

from senet_transfer.cli.ablation import command

if __name__ == "__main__":
    command()
