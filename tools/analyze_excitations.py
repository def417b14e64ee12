#!/usr/bin/env python
"""Analyse the gates of an SE network; see --help for examples."""

from senet_transfer.cli.analysis.gates import command

if __name__ == "__main__":
    command()
