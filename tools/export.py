#!/usr/bin/env python
"""Export a model for deployment; see --help for examples."""

from senet_transfer.cli.export import command

if __name__ == "__main__":
    command()
