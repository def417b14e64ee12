#!/usr/bin/env python
"""Run a trained detector or classifier on images; see --help."""

from senet_transfer.cli.predict import command

if __name__ == "__main__":
    command()
