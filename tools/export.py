#!/usr/bin/env python
"""Write a model for production; see --help for examples."""

from senet_transfer.cli.export import command

if __name__ == "__main__":
    command()
