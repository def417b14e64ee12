#!/usr/bin/env python
"""Renders the shapes data set, the small detection problem that `make demo` trains on.

Some of its shapes are also cut out, a folder a class, for the instant twins of classifiers.

    python datasets/prepare_shapes.py

Takes some seconds on one core. A second run finds the data set and does nothing.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("shapes")
