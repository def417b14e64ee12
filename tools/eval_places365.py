#!/usr/bin/env python
"""Evaluate a classifier on Places365's validation set; see --help."""

from senet_transfer.cli.evaluate import command_places365

if __name__ == "__main__":
    command_places365()
