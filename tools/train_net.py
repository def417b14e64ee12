#!/usr/bin/env python
"""Trains or evaluates a model from a config; see --help for examples."""

from senet_transfer.engine.arguments import argument_parser
from senet_transfer.engine.launch import run
from senet_transfer.engine.train import main

if __name__ == "__main__":
    run(main, argument_parser().parse_args())
