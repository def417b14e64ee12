#!/usr/bin/env python
"""Render the shapes dataset, a small detection dataset used by `make demo`.

Crops of some shapes are also saved, in one folder per class, for use by the smoke-test configs.

    python datasets/prepare_shapes.py

This takes a few seconds on one core. An existing dataset is not overwritten.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("shapes")
