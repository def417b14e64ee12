#!/usr/bin/env python
"""Predict on images with a checkpoint of tools/train_net.py; see --help."""

from senet_transfer.cli.predict import command

if __name__ == "__main__":
    command()
