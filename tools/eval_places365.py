#!/usr/bin/env python
"""Evaluate a classifier on the Places365 validation set; see --help for examples."""

from senet_transfer.cli.evaluate import command_places365

if __name__ == "__main__":
    command_places365()
