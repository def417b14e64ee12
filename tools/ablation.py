#!/usr/bin/env python
"""Train the SE variants in the paper's ablations; see --help for examples."""

from senet_transfer.cli.analysis.ablation import command

if __name__ == "__main__":
    command()
