#!/usr/bin/env python
"""Turns a tree of images, one folder a class, into the shards that training and evaluation read.

    python datasets/prepare_folder.py --source flowers/train --output datasets/flowers/train
    python datasets/prepare_folder.py --source flowers/val --output datasets/flowers/val \\
        --classes-from datasets/flowers/train

A few thousand images need no shards: training and evaluation read such a tree as it is. A run that
was stopped goes on where it was.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("folder")
