#!/usr/bin/env python
"""Train or evaluate a model from a config; see --help for examples."""

from senet_transfer.cli.train import command

if __name__ == "__main__":
    command()
