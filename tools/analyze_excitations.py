#!/usr/bin/env python
"""Show what the gates of an SE network do; see --help for examples."""

from senet_transfer.cli.gates import command

if __name__ == "__main__":
    command()
