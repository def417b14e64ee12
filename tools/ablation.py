#!/usr/bin/env python
"""Train the SE variants of the SENet paper's ablation studies; see --help for examples."""

from senet_transfer.cli.analysis.ablation import command

if __name__ == "__main__":
    command()
