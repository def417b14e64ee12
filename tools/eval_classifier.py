#!/usr/bin/env python
"""Evaluate a classifier; see --help for examples."""

from senet_transfer.cli.evaluate import command

if __name__ == "__main__":
    command()
