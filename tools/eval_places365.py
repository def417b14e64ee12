#!/usr/bin/env python
"""Evaluates a classifier on Places365's validation set; see --help."""

from senet_transfer.cli.eval_places365 import command

if __name__ == "__main__":
    command()
