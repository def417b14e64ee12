#!/usr/bin/env python
"""Train the paper's variants of SE; see --help for examples."""

from senet_transfer.cli.ablation import command

if __name__ == "__main__":
    command()
