#!/usr/bin/env python
"""Render the shapes data set, the small detection data set that `make demo` trains on.

Crops of some shapes are also written, in one folder per class, for the smoke-test configs.

    python datasets/prepare_shapes.py

This takes a few seconds on one core. An existing data set is kept.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("shapes")
